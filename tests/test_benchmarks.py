"""Benchmarks that nothing else runs, in seconds; and what only a simulated learner can be made to do in time."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import publish, scaling
from benchmarks.simulated import simulate
from benchmarks.simulated_actors import SimulatedRank, Times
from tstar_ray.checkpoint import newest_checkpoint
from tstar_ray.config import load_config

pytestmark = pytest.mark.cluster
QUICK = Times(token_s=0.001, median_tokens=40, update_s=0.0, load_s=0.0, slots=8, parameters=1000)


def test_scaling_counts_the_tokens_of_a_real_controller(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "Times", lambda: QUICK)
    monkeypatch.setattr(sys, "argv", ["scaling", "--actors", "1", "--staleness", "--updates", "2", "--groups", "2"])
    scaling.main()
    [row] = json.loads(capsys.readouterr().out.partition("\n{\n")[2].join(("{\n", "")))["actors"]
    assert row["groups_per_update"] == 2
    assert 0 < row["tokens_per_s"] <= 8 / 0.001
    assert row["efficiency"] == 1.0


def test_publishing_is_timed_against_one_call_for_each_parameter(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish", "--model", "embedded", "--actors", "1", "--repeats", "2"])
    publish.main()
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"].keys() >= {"total", "by_parameter", "by_parameter_pipelined"}
    assert found["tensors"] > 10


class MortalRank(SimulatedRank):
    """Its first process dies in its first save."""

    def _save(self, folder: Path) -> None:
        if not os.path.exists(mark := os.environ["TSTAR_TEST_DIED"]):
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save(folder)


def test_a_rank_lost_before_the_first_checkpoint_starts_the_run_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TSTAR_TEST_DIED", str(tmp_path / "died"))
    settings = ["curriculum.blocks=[4]", "curriculum.updates=[2]", "rollout.problems=2", "rollout.group_size=4"]
    settings += ["eval.problems=1", "eval.every=0", "actors.count=1"]
    folder = tmp_path / "run"
    result = simulate(load_config(None, settings), QUICK, folder, name="mortal", rank_class=MortalRank)
    assert (tmp_path / "died").exists(), "the fault really happened"
    assert "building the learner anew" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in lines if r["kind"] == "update"] == [1, 2]
    assert [r["update"] for r in lines if r["kind"] == "evaluation"] == [0, 2], "the start table is there once"
    ledger = newest_checkpoint(folder / "checkpoints", refused=pytest.fail).state["ledger"]
    assert result.groups == {"dispatched": ledger["dispatched"], **ledger["ended"]}
    assert result.groups["dispatched"] == sum(n for how, n in result.groups.items() if how != "dispatched") == 4
