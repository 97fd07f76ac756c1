"""`python -m cluster.scale` where nothing works any more; with a run at work: tests/test_faults.py."""

import json
import time

import pytest

from cluster.scale import main, read_request
from tstar_ray.claim import hold


@pytest.fixture
def folder(tmp_path):
    """Of a run that was lost: two rollout actors worked."""
    place = {"node": "a", "pid": 5, "log": None}
    role = {"wanted": 2, "live": ["rollout-0", "rollout-1"], "lost": 0, "actors": {"rollout-0": place}}
    status = {"driver": place, "learner": {"actors": {}}, "rollout": role, "reward": role | {"actors": {}}}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / ".driver").touch()
    return tmp_path


def test_a_run_that_was_lost_takes_what_was_asked_for_when_it_goes_on(folder, capsys):
    began = time.monotonic()
    assert main([str(folder), "--rollout", "3"]) == 1
    assert time.monotonic() - began < 30, "nobody is there to wait for"
    told = capsys.readouterr()
    assert f"nothing works in {folder} now" in told.out
    assert f"holds from its next start on (run.resume={folder})" in told.err
    assert read_request(folder) == {"rollout": 3}
    assert main([str(folder)]) == 0
    assert "rollout-0 on a, process 5, log on its terminal" in capsys.readouterr().out


def test_a_run_that_has_ended_needs_no_actors(folder, capsys):
    (folder / "result.json").write_text("{}")
    assert main([str(folder), "--rollout", "3"]) == 2
    assert f"error: {folder} has ended: no actors are needed any more" in capsys.readouterr().err
    assert read_request(folder) == {}
    assert main([str(folder)]) == 0


def test_a_run_at_work_is_waited_for(folder, capsys):
    with hold(folder):
        assert main([str(folder), "--rollout", "3", "--wait", "0.5"]) == 1
        assert "what was asked for stays asked for" in capsys.readouterr().err
        assert main([str(folder), "--rollout", "2", "--wait", "60"]) == 0
        assert "nothing works" not in capsys.readouterr().out
