"""`python -m tstar_ray.experiment` as a user runs it: real runs, a signal in the middle, a failing arm."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import environment

pytestmark = pytest.mark.cluster
TINY = Path(__file__).parents[1] / "configs" / "experiment_tiny.yaml"


def command(tmp_path, *settings, file=TINY):
    return [sys.executable, "-m", "tstar_ray.experiment", str(file), f"dir={tmp_path}", *settings]


def experiment(tmp_path, *settings, expect=0, file=TINY):
    job = subprocess.run(
        command(tmp_path, *settings, file=file),
        capture_output=True, text=True, timeout=580, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert job.returncode == expect, job.stdout + job.stderr
    return job.stdout + job.stderr


def test_a_stopped_experiment_goes_on_and_its_table_is_that_of_its_runs(tmp_path):
    job = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=tmp_path
    )
    lines, log = [], tmp_path / "tiny" / "logs" / "direct-s1.log"
    for line in job.stdout:
        lines.append(line)
        if line.startswith("direct-s1 started"):
            break
    deadline = time.monotonic() + 300
    while not any(line.split()[:1] == ["2/4"] for line in log.read_text().splitlines()):
        assert time.monotonic() < deadline, log.read_text()
        assert job.poll() is None, log.read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    lines += job.stdout.readlines()
    assert job.wait(timeout=60) == 130, "".join(lines)
    cells = tmp_path / "tiny" / "cells"
    assert (cells / "tstar-s1" / "result.json").is_file()
    assert not (cells / "direct-s1" / "result.json").exists()
    finished = (cells / "tstar-s1" / "result.json").stat().st_mtime_ns

    output = experiment(tmp_path)
    assert "4 runs, 1 done" in output
    assert "resumed" in log.read_text(), "the interrupted run went on where it was"
    assert (cells / "tstar-s1" / "result.json").stat().st_mtime_ns == finished, "a finished run is left alone"

    found = json.loads((tmp_path / "tiny" / "experiment.json").read_text())
    assert (found["failed"], found["unfinished"]) == ([], [])
    results = {
        (arm, seed): json.loads((cells / f"{arm}-s{seed}" / "result.json").read_text())
        for arm in ("tstar", "direct")
        for seed in (1, 2)
    }
    rows = {(r["arm"], r["block"]): r for r in found["rows"]}
    assert len(rows) == 6
    for arm, key, source in (("tstar", "after", "tstar"), ("direct", "after", "direct"), ("base", "before", "tstar")):
        for place, block in enumerate((4, 8)):
            scores = [results[source, seed][key][place] for seed in (1, 2)]
            accuracies = [s["accuracy"] for s in scores]
            row = rows[arm, block]
            assert row["accuracy"] == pytest.approx(statistics.mean(accuracies))
            assert row["accuracy_sd"] == pytest.approx(statistics.stdev(accuracies))
            assert row["accuracy_worst"] == min(accuracies)
            assert row["tpf"] == pytest.approx(statistics.mean(s["tpf"] for s in scores))
            assert row["tpf_with_commits"] == pytest.approx(statistics.mean(s["tpf_with_commits"] for s in scores))
    for arm in ("tstar", "direct"):
        spent = [results[arm, seed]["budget"] for seed in (1, 2)]
        for name in ("samples", "learner_tokens"):
            assert found["budgets"][arm][name] == pytest.approx(statistics.mean(s[name] for s in spent))
        assert found["budgets"][arm]["samples"] == 4 * 6 * 4, "every update samples the same, resumed or not"
    assert all(s["before"] == results["tstar", 1]["before"] for s in results.values()), "greedy scores of one model"
    for name in ("table.md", "pareto.png", "pareto.svg", "curves.png", "curves.svg"):
        assert (tmp_path / "tiny" / name).stat().st_size > 200, name

    again = experiment(tmp_path)
    assert "4 runs, 4 done" in again
    assert "started" not in again
    changed = experiment(tmp_path, "settings=[rollout.problems=5]", "--table", expect=2)
    assert "was begun with other settings" in changed


def test_a_failed_run_is_named_and_does_not_stop_the_others_and_all_models_are_decoded_at_all_thresholds(tmp_path):
    file = tmp_path / "e.yaml"
    small = ["curriculum.blocks=[4]", "curriculum.updates=[1]", "rollout.problems=4", "rollout.group_size=2"]
    small += ["eval.problems=8", "eval.every=0", "eval.blocks=[4,8]"]
    file.write_text(
        json.dumps(
            {
                "name": "e",
                "settings": small,
                "seeds": [1],
                "thresholds": [0.5, 0.9],
                "arms": {
                    "base": {"decode_only": True},
                    "broken": {"settings": ["model.path=/nowhere"]},
                    "works": {},
                },
            }
        )
    )
    output = experiment(tmp_path, file=file, expect=1)
    assert "broken-s1 FAILED (exit code 2): error: model.path=/nowhere" in output
    assert "works-s1 done" in output
    assert "failed: broken-s1" in output
    found = json.loads((tmp_path / "e" / "experiment.json").read_text())
    assert found["failed"] == found["unfinished"] == ["broken-s1"]
    assert {r["arm"] for r in found["rows"]} == {"base", "works"}

    frontier = {(r["arm"], r["block"], r["threshold"]): r for r in found["frontier"]["rows"]}
    assert frontier.keys() == {(arm, b, t) for arm in ("base", "works") for b in (4, 8) for t in (0.5, 0.9)}
    for row in found["rows"]:
        same = frontier[row["arm"], row["block"], 0.9]
        assert (same["accuracy"], same["tpf"]) == (row["accuracy"], row["tpf"]), "what the run itself decoded at 0.9"
    assert frontier["base", 8, 0.5]["tpf"] > frontier["base", 8, 0.9]["tpf"]
    assert (tmp_path / "e" / "frontier.png").stat().st_size > 5000
    assert "B=8 at other thresholds" in (tmp_path / "e" / "table.md").read_text()
    again = experiment(tmp_path, "--table", file=file)
    assert "started" not in again
