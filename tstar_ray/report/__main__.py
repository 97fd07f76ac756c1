"""Write the report of a run, or of an experiment.

python -m tstar_ray.report runs/NAME
python -m tstar_ray.report --experiment OUT tstar=runs/t1,runs/t2 direct=runs/d1,runs/d2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tstar_ray.config import ConfigError
from tstar_ray.report import write_experiment_report, write_run_report


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 nothing to report."""
    parser = argparse.ArgumentParser(
        prog="python -m tstar_ray.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", type=Path, metavar="OUT", help="folder for the report of several arms")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; with --experiment ARM=RUN,RUN,…")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.experiment:
            arms = {}
            for text in arguments.runs:
                arm, equals, paths = text.partition("=")
                if not equals:
                    raise ConfigError(f"{text!r}: with --experiment write ARM=RUN,RUN,…")
                arms[arm] = [Path(path) for path in paths.split(",") if path]
            print(f"written: {write_experiment_report(arms, arguments.experiment)}")
        else:
            for run in arguments.runs:
                print(f"written: {write_run_report(Path(run))}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
