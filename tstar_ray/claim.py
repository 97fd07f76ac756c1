"""The folder of a run: one driver at a time works in it, and a mistake at the start costs no name.

    run.name, run.resume ──► folder ──► .driver locked as long as the driver lives ──► new, cleared or resumed

A run that goes on keeps the settings it was begun with, but for those that the command gives; what they change is said,
and what decides the order of its problems must stay.

The kernel frees the lock however a driver ends. A driver on another node may have died with its node, and the file
server learns of it late: whoever resumes waits for that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tstar_ray.config_base import ConfigError, Section
from tstar_ray.settings import differences, load_settings

_LOCK = ".driver"
_LEASE_S = 120.0
"""File servers free the locks of a lost node after 90 s or less (NFS 4: lease of 90 s)."""
_POLL_S = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold(folder: Path, *, lease_s: float = _LEASE_S, say: Callable[[str], None] = print) -> Iterator[None]:
    """Be the only process at work in an existing folder; raises ConfigError that names the other.

    One on this machine is believed at once, one on another for ``lease_s`` seconds. File systems without locks are
    taken as they are.
    """
    with open(folder / _LOCK, "a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + lease_s, False
        while not _lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() >= deadline:
                raise ConfigError(f"{folder} is in use by {holder}; end that first, or choose another folder or name")
            if not told:
                say(f"{folder} is in use by {holder}; waiting {lease_s:.0f} s, as that machine may be lost")
                told = True
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def held_by(folder: Path) -> str | None:
    """Who works in a folder, as far as can be told from here; empty: nobody, None: nothing that locks it ever has."""
    try:
        named = (folder / _LOCK).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    process, _, host = named.removeprefix("process ").partition(" on ")
    if host == socket.gethostname() and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
    return named


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextmanager
def claim_folder(config: Any) -> Iterator[tuple[Path, Any]]:
    """Make the run folder, or take the one to resume; refuses one that holds another run, or that is in use.

    ``config`` has a section ``run`` (`tstar_ray.config.RunConfig`). Yields the folder, and the configuration in which
    ``run.resume=auto`` has become the folder, or None for a new run. None in place of the configuration: the run has
    ended and is left as it is (auto does not look at its settings; a folder given by name is asked for nothing new).
    """
    name = config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.curriculum.mode}"
    folder, resume = (config.run.dir / name).resolve(), config.run.resume
    if resume == Path("auto"):
        if not config.run.name:
            raise ConfigError("run.resume=auto needs run.name: the folder to look into is run.dir/run.name")
    elif resume:
        folder = resume.resolve()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"run.resume={resume}: no run folder (it has no config.yaml)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir}: cannot make {folder}: {error}") from error
    with hold(folder):
        auto, began = resume == Path("auto"), any(folder.glob("checkpoints/u*"))
        if auto:
            resume = folder if began else None
            config = config.model_copy(update={"run": config.run.model_copy(update={"resume": resume})})
        if not resume and _taken(folder, again=auto):
            raise ConfigError(
                f"{folder} already holds {'something else' if auto else 'a run'}; choose another run.name"
                + ("" if auto else f", or continue it with run.resume={folder}")
            )
        ended, changed = (auto or resume) and (folder / "result.json").is_file(), False
        if resume and (folder / "config.yaml").is_file() and not (auto and ended):
            changed = _compare(load_settings(type(config), folder / "config.yaml"), config, folder)
        if ended and not changed:
            yield folder, None
            return
        if not resume:
            _clear(folder)  # of one that ended before there was anything to continue from
        (folder / "config.yaml").write_text(config.to_yaml())
        yield folder, config


def recorded_settings(kind: type[Section], given: dict[str, Any]) -> Path | None:
    """config.yaml of the run that what is given for a ``kind`` of settings continues; None: it continues none."""
    run = given.get("run")
    if "run" not in kind.model_fields or not isinstance(run, dict) or not run.get("resume"):
        return None
    folder = Path(str(run["resume"]))
    if run["resume"] == "auto":
        folder = Path(str(run.get("dir") or kind.model_fields["run"].default.dir)) / str(run.get("name") or "")
    file = folder / "config.yaml"
    return file if file.is_file() and any(folder.glob("checkpoints/u*")) else None


def _compare(begun: Any, config: Any, folder: Path) -> bool:
    """Say what a resumed run does otherwise from here on, if anything; raises ConfigError where its data would be
    others."""
    changed = False
    for key, (old, new) in differences(begun, config).items():
        if key in ("run.dir", "run.name", "run.resume"):
            continue
        if key == "run.seed" or key.startswith("data."):
            raise ConfigError(
                f"{key}={new}: {folder} was begun with {old}, which decides what problems come next; leave it, or "
                "begin another run with model.path set to what this one has trained"
            )
        print(f"from here on {key}={new} (so far {old})")
        changed = True
    return changed


def _taken(folder: Path, *, again: bool) -> bool:
    """It is no run folder, or something was measured or saved there: one that failed to start is free, and so is,
    for the same command ``again``, one that ended before its first checkpoint."""
    metrics = folder / "metrics.jsonl"
    if (folder / "config.yaml").is_file():
        return not again and (any(folder.glob("checkpoints/u*")) or (metrics.is_file() and metrics.stat().st_size > 0))
    return any(entry.name != _LOCK for entry in folder.iterdir())


def _clear(folder: Path) -> None:
    for left in ("metrics.jsonl", "tensorboard", "traces", "status.json", "checkpoints"):
        path = folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
