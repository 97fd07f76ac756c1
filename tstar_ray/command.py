"""What the commands that take a configuration share: --config, --print-config, section.key=value, exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from tstar_ray.claim import recorded_settings
from tstar_ray.config_base import ConfigError, Section, WorkError
from tstar_ray.settings import load_settings, to_yaml

SectionT = TypeVar("SectionT", bound=Section)


def run_command(
    kind: type[SectionT],
    launch: Callable[[SectionT], int],
    argv: Sequence[str] | None,
    *,
    module: str,
    description: str | None,
    settings: str,
    interrupted: str,
    example: str,
) -> int:
    """Parse, load, and launch; returns the exit code: that of ``launch``, 1 for failed work (`WorkError`), 2 for a
    mistake, 130 for Ctrl-C or SIGTERM.

    ``settings`` says where the settings are described, ``interrupted`` what is left after Ctrl-C, and ``example`` is
    the setting that an error message shows.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Every setting with its default and meaning: {settings}, or --print-config.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings, over the file's")
    arguments = parser.parse_intermixed_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = load_settings(
            kind, arguments.config, arguments.settings, example=example, below=partial(recorded_settings, kind)
        )
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        return launch(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: Any) -> None:
    """SIGTERM, as Ctrl-C, takes down what was built so far."""
    raise KeyboardInterrupt
