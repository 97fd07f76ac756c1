"""What the processes of a private cluster printed, kept in the run folder when the cluster's own folder goes.

/tmp/tstar-*/session_latest/logs/worker-ID-JOB-PID.err ──► runs/NAME/logs/START/rollout-0.PID.err
"""

from __future__ import annotations

import re
from pathlib import Path

_MOST = 2**20
"""Bytes of one file that are kept, from its end."""
_NAME = re.compile(rb"^:actor_name:(\w+)\((\d+)\)$", re.MULTILINE)
_DAEMONS = ("gcs_server.out", "raylet.out", "raylet.err")


def keep_logs(session: Path, folder: Path) -> None:
    """Copy what is not empty: of actors, under their names, and of Ray's daemons."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((session / "logs").glob("worker-*.*")):
        text = file.read_bytes()
        names = _NAME.findall(text)
        told = re.sub(rb"^:\w+:.*\n?", b"", text, flags=re.MULTILINE)
        if names and told.strip():
            role, index = names[-1]
            pid = file.stem.rpartition("-")[2]
            name = f"{role.decode().lower()}-{index.decode()}.{pid}{file.suffix}"
            (folder / name).write_bytes(told[-_MOST:])
    for name in _DAEMONS:
        file = session / "logs" / name
        if file.is_file() and file.stat().st_size:
            (folder / name).write_bytes(file.read_bytes()[-_MOST:])
