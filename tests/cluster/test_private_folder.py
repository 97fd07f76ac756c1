"""Folders of private clusters whose process was killed: cleared by the next, logs kept; those in use are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.private_folder import PrivateFolder, clear_orphans

OWNER = """
import sys, time
from pathlib import Path
from cluster.private_folder import PrivateFolder

folder = PrivateFolder(Path(sys.argv[2]) if len(sys.argv) > 2 else None, place=Path(sys.argv[1]))
logs = folder.path / "session_1" / "logs"
logs.mkdir(parents=True)
(folder.path / "session_latest").symlink_to(logs.parent)
(logs / "worker-a-b-77.err").write_text(":actor_name:Rollout(0)\\nout of memory\\n")
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def owned(tmp_path):
    """Starts a process that owns a private folder in tmp_path; (process, folder)."""
    processes = []

    def start(*logs):
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), *map(str, logs)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_folder_of_a_killed_process_is_cleared_and_its_logs_kept(owned, tmp_path):
    (tmp_path / "run").mkdir()
    process, folder = owned(tmp_path / "run" / "logs" / "start")
    assert clear_orphans(place=tmp_path, ending_s=0) == [], "its process lives"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    assert clear_orphans(place=tmp_path) == [], "Ray's processes may still be ending"
    assert [str(f) for f in clear_orphans(place=tmp_path, ending_s=0)] == [folder]
    assert not os.path.exists(folder)
    assert (tmp_path / "run" / "logs" / "start" / "rollout-0.77.err").read_text() == "out of memory\n"


def test_a_run_folder_that_was_thrown_away_does_not_come_back(owned, tmp_path):
    process, folder = owned(tmp_path / "gone" / "logs" / "start")
    process.kill()
    process.wait()
    assert len(clear_orphans(place=tmp_path, ending_s=0)) == 1
    assert not os.path.exists(folder)
    assert not (tmp_path / "gone").exists()


def test_a_link_in_tmp_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "owner").write_text(str(tmp_path / "run" / "logs" / "start"))
    (tmp_path / "run").mkdir()
    (tmp_path / "tstar-link").symlink_to(mine)
    assert clear_orphans(place=tmp_path, ending_s=0) == []
    assert list((tmp_path / "run").iterdir()) == []
    assert (mine / "owner").exists()


def test_the_next_private_folder_clears_it(owned, tmp_path):
    process, folder = owned()
    process.kill()
    process.wait()
    before = time.time() - 3600
    for entry in ("owner", "session_1/logs/worker-a-b-77.err"):
        os.utime(os.path.join(folder, entry), (before, before))

    mine = PrivateFolder(None, place=tmp_path)
    assert not os.path.exists(folder)
    assert mine.path.is_dir()
    assert clear_orphans(place=tmp_path, ending_s=0) == [], "its own is in use"
    mine.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_an_owner_file_is_nobodys_business(tmp_path):
    (tmp_path / "tstar-mine").mkdir()
    (tmp_path / "tstar-mine" / "work").write_text("of hours")
    assert clear_orphans(place=tmp_path, ending_s=0) == []
    assert (tmp_path / "tstar-mine" / "work").exists()
