"""The folder of a private cluster: owned while its process lives, and cleared away after a process that was killed.

    /tmp/tstar-XXXXXXXX/
        owner          locked as long as the process that made it lives; names the folder that takes the logs
        session_*/     Ray's

The kernel frees the lock however a process ends. Whoever makes the next private folder keeps the logs of those
without an owner, as their own process would have, and removes them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from cluster.logs import keep_logs

_PLACE = Path("/tmp")
"""A socket path may have 107 characters, and Ray appends about 65 to the folder."""
_ENDING_S = 30.0
"""Ray's processes end by themselves some seconds after their driver; until then they write."""


class PrivateFolder:
    """A folder made and owned by this process."""

    def __init__(self, logs: Path | None, *, place: Path = _PLACE) -> None:
        """``logs``: takes what the cluster's processes printed; None: it goes with the folder."""
        clear_orphans(place=place)
        self._logs = logs
        self.path = Path(tempfile.mkdtemp(prefix="tstar-", dir=place))
        draft = self.path / "draft"
        self._owner = open(draft, "w")  # noqa: SIM115 - open, and so locked, until `remove`
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        self._owner.write(str(logs.absolute()) if logs else "")
        self._owner.flush()
        draft.rename(self.path / "owner")  # an owner file is never seen without its lock

    def remove(self) -> None:
        """Keep the logs, then remove the folder."""
        try:
            _keep_and_remove(self.path, self._logs)
        finally:
            self._owner.close()


def clear_orphans(*, place: Path = _PLACE, ending_s: float = _ENDING_S) -> list[Path]:
    """Keep the logs of private folders of this user whose process is gone, and remove them; those it removed.

    A folder that was written to within ``ending_s`` is left: its cluster may still be ending.
    """
    cleared = []
    for owner in place.glob("tstar-*/owner"):
        folder = owner.parent
        if not _is_own(folder):
            continue
        with suppress(OSError), open(owner) as file:  # in use, or gone in the meantime
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            written = max((entry.stat().st_mtime for entry in folder.glob("session_*/logs/*")), default=0.0)
            if max(written, owner.stat().st_mtime) + ending_s < time.time():
                name = file.read()
                # runs/NAME/logs/START: a run folder that was thrown away does not come back.
                wanted = bool(name) and Path(name).parents[1].is_dir()
                _keep_and_remove(folder, Path(name) if wanted else None)
                cleared.append(folder)
    return cleared


def _is_own(folder: Path) -> bool:
    """A real folder of this user; /tmp is everybody's, and links in it lead anywhere."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _keep_and_remove(folder: Path, logs: Path | None) -> None:
    try:
        if logs:
            keep_logs(folder / "session_latest", logs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
