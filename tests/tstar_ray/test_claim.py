"""A run folder has one driver, whatever becomes of it, and a start that failed costs no name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from tstar_ray.claim import claim_folder, held_by, hold, recorded_settings
from tstar_ray.config import Config, ConfigError, load_config
from tstar_ray.settings import load_settings

HOLDER = """
import sys, time
from pathlib import Path
from tstar_ray.claim import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def config(tmp_path, *settings):
    return load_config(None, [f"run.dir={tmp_path}", *settings])


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it_and_free_when_that_is_killed(holder, tmp_path):
    own = rf"in use by process {holder.pid} on {socket.gethostname()}; end that first"
    with pytest.raises(ConfigError, match=own), hold(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    with hold(tmp_path):
        assert (tmp_path / ".driver").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert (tmp_path / ".driver").read_text() == ""


def test_a_holder_on_a_lost_machine_is_waited_for(holder, tmp_path):
    (tmp_path / ".driver").write_text("process 5 on another-node")
    with pytest.raises(ConfigError, match="in use by process 5 on another-node"), hold(tmp_path, lease_s=0.2):
        pass
    said = []
    threading.Timer(1.0, holder.kill).start()
    started = time.monotonic()
    with hold(tmp_path, lease_s=60, say=said.append):
        assert 0.5 < time.monotonic() - started < 30
    assert said == [f"{tmp_path} is in use by process 5 on another-node; waiting 60 s, as that machine may be lost"]


def test_who_works_in_a_folder_can_be_told(holder, tmp_path):
    assert held_by(tmp_path) == f"process {holder.pid} on {socket.gethostname()}"
    holder.kill()
    holder.wait()
    assert held_by(tmp_path) == "", "killed"
    with hold(tmp_path):
        assert held_by(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    assert held_by(tmp_path) == "", "ended"
    (tmp_path / ".driver").write_text("process 5 on another-node")
    assert held_by(tmp_path) == "process 5 on another-node", "nothing to say that it does not"
    (tmp_path / ".driver").unlink()
    assert held_by(tmp_path) is None, "an evaluation, say"


def test_two_drivers_never_share_a_run(holder, tmp_path):
    for settings in ([f"run.name={tmp_path.name}"], [f"run.name={tmp_path.name}", "run.resume=auto"]):
        given = config(tmp_path.parent, *settings)
        with pytest.raises(ConfigError, match="in use by process"), claim_folder(given):
            pass


def test_a_run_that_failed_to_start_leaves_its_name_free_and_one_that_measured_does_not(tmp_path):
    named = config(tmp_path, "run.name=a")
    with claim_folder(named) as (folder, _):
        (folder / "metrics.jsonl").touch()
    with claim_folder(named) as (again, _):
        assert again == folder
        assert not (folder / "metrics.jsonl").exists()
        (folder / "metrics.jsonl").write_text('{"kind": "evaluation"}\n')
    refused = "a already holds a run; choose another run.name, or continue it with"
    with pytest.raises(ConfigError, match=refused), claim_folder(named):
        pass
    assert (folder / "metrics.jsonl").read_text(), "what it measured is still there"


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="a already holds a run"), claim_folder(config(tmp_path, "run.name=a")):
        pass
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years"


def test_auto_resumes_where_there_is_a_checkpoint_starts_where_there_is_none_and_keeps_a_run_that_ended(tmp_path):
    auto = config(tmp_path, "run.name=a", "run.resume=auto")
    with claim_folder(auto) as (folder, claimed):
        assert claimed.run.resume is None
        (folder / "metrics.jsonl").write_text("half a start")
    with claim_folder(auto) as (folder, claimed):
        assert claimed.run.resume is None
        assert not (folder / "metrics.jsonl").exists(), "cleared: there was nothing to continue from"
        (folder / "metrics.jsonl").write_text("all of it")
        (folder / "result.json").write_text("{}")
    with claim_folder(auto) as (folder, claimed):
        assert claimed is None
        assert (folder / "metrics.jsonl").read_text() == "all of it", "ended, its checkpoints thrown away by its owner"
        (folder / "checkpoints" / "u00004").mkdir(parents=True)
    with claim_folder(auto) as (folder, claimed):
        assert claimed is None
    (folder / "result.json").unlink()
    with claim_folder(auto) as (folder, claimed):
        assert claimed.run.resume == folder


def test_auto_never_clears_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "of-something-else").write_text("years")
    auto = config(tmp_path, "run.name=a", "run.resume=auto")
    refused = "a already holds something else; choose another run.name"
    with pytest.raises(ConfigError, match=refused), claim_folder(auto):
        pass
    assert (tmp_path / "a" / "checkpoints" / "of-something-else").read_text() == "years"


def test_a_run_goes_on_with_the_settings_it_was_begun_with(tmp_path, capsys):
    first = config(tmp_path, "run.name=a", "learner.lr=0.003", "rollout.group_size=4", "data.limit=100")
    with claim_folder(first) as (folder, _):
        (folder / "checkpoints" / "u00004").mkdir(parents=True)
    file = tmp_path / "more.yaml"
    file.write_text("learner: {grad_clip: 0.5}")

    def resumed(*settings):
        below = partial(recorded_settings, Config)
        return load_settings(Config, file, [f"run.dir={tmp_path}", *settings], below=below)

    for how in ([f"run.resume={folder}"], ["run.resume=auto", "run.name=a"]):
        given = resumed(*how, "rollout.group_size=8")
        assert (given.learner.lr, given.learner.grad_clip, given.rollout.group_size) == (0.003, 0.5, 8)
    with claim_folder(given) as (_, claimed):
        assert claimed.learner.lr == 0.003
    said = capsys.readouterr().out.splitlines()
    assert said == ["from here on learner.grad_clip=0.5 (so far 1.0)", "from here on rollout.group_size=8 (so far 4)"]
    with claim_folder(given):
        assert capsys.readouterr().out == "", "it is what the run has now"

    for other in ("run.seed=5", "data.limit=50"):
        refused = rf"{other}: .* was begun with (20_?11_?14|100), which decides what problems come next"
        with pytest.raises(ConfigError, match=refused), claim_folder(resumed(f"run.resume={folder}", other)):
            pass
    assert load_config(folder / "config.yaml").data.limit == 100, "a refused command changes nothing"


def test_a_run_that_has_ended_keeps_its_settings(tmp_path):
    with claim_folder(config(tmp_path, "run.name=a", "learner.lr=0.003")) as (folder, _):
        (folder / "checkpoints" / "u00004").mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    for resume, lr in (("auto", 0.5), (folder, 0.003)):
        with claim_folder(config(tmp_path, "run.name=a", f"run.resume={resume}", f"learner.lr={lr}")) as (_, claimed):
            assert claimed is None
    assert load_config(folder / "config.yaml").learner.lr == 0.003
    changed = config(tmp_path, "run.name=a", f"run.resume={folder}", "learner.lr=0.5")
    with claim_folder(changed) as (_, claimed):
        assert claimed.learner.lr == 0.5, "asked for by name, with something new: it goes on"
