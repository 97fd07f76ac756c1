"""`python -m tstar_ray.experiment` as a user runs it: real runs, a signal in the middle, a failing arm, thresholds."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jobs import environment

pytestmark = pytest.mark.cluster
TINY = Path(__file__).parents[1] / "configs" / "experiment_tiny.yaml"


def command(tmp_path, *settings):
    return [sys.executable, "-m", "tstar_ray.experiment", str(tmp_path / "e.yaml"), f"dir={tmp_path}", *settings]


def experiment(tmp_path, *settings, expect=0):
    job = subprocess.run(
        command(tmp_path, *settings),
        capture_output=True, text=True, timeout=580, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert job.returncode == expect, job.stdout + job.stderr
    return job.stdout + job.stderr


def test_a_stopped_experiment_goes_on_and_its_table_is_that_of_its_runs(tmp_path):
    """Two seeds of the tiny experiment with one arm that works and one that cannot; every model at two thresholds."""
    given = yaml.safe_load(TINY.read_text())
    given["arms"] = {"base": given["arms"]["base"], "tstar": {}, "broken": {"settings": ["model.path=/nowhere"]}}
    given["settings"] += ["eval.problems=12", "eval.every=0", "run.report=false", "run.trackers=[]"]
    (tmp_path / "e.yaml").write_text(json.dumps(given | {"thresholds": [0.5, 0.9]}))
    job = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=tmp_path
    )
    folder = tmp_path / "tiny"
    lines, log, cells = [], folder / "logs" / "tstar-s2.log", folder / "cells"
    for line in job.stdout:
        lines.append(line)
        if line.startswith("tstar-s2 started"):
            break
    deadline = time.monotonic() + 300
    while not any(line.split()[:1] == ["2/4"] for line in log.read_text().splitlines()):
        assert time.monotonic() < deadline, log.read_text()
        assert job.poll() is None, log.read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    lines += job.stdout.readlines()
    assert job.wait(timeout=60) == 130, "".join(lines)
    assert not (cells / "tstar-s2" / "result.json").exists()
    finished = (cells / "tstar-s1" / "result.json").stat().st_mtime_ns

    output = experiment(tmp_path, expect=1)
    assert "4 runs, 1 done" in output
    assert "resumed" in log.read_text(), "the interrupted run went on where it was"
    assert (cells / "tstar-s1" / "result.json").stat().st_mtime_ns == finished, "a finished run is left alone"
    assert "broken-s1 FAILED (exit code 2): error: model.path=/nowhere" in output
    assert "failed: broken-s1" in output

    found = json.loads((folder / "experiment.json").read_text())
    assert found["failed"] == found["unfinished"] == ["broken-s1", "broken-s2"]
    results = [json.loads((cells / f"tstar-s{seed}" / "result.json").read_text()) for seed in (1, 2)]
    rows = {(r["arm"], r["block"]): r for r in found["rows"]}
    assert rows.keys() == {(arm, block) for arm in ("base", "tstar") for block in (4, 8)}
    for (arm, block), row in rows.items():
        scores = [r["before" if arm == "base" else "after"][block // 4 - 1] for r in results]
        accuracies = [s["accuracy"] for s in scores]
        assert row["accuracy"] == pytest.approx(statistics.mean(accuracies))
        assert row["accuracy_sd"] == pytest.approx(statistics.stdev(accuracies))
        assert row["accuracy_worst"] == min(accuracies)
        assert row["tpf"] == pytest.approx(statistics.mean(s["tpf"] for s in scores))
        assert row["tpf_with_commits"] == pytest.approx(statistics.mean(s["tpf_with_commits"] for s in scores))
    spent = found["budgets"]["tstar"]
    assert spent["learner_tokens"] == pytest.approx(statistics.mean(r["budget"]["learner_tokens"] for r in results))
    assert spent["samples"] == 4 * 6 * 4, "every update samples the same, resumed or not"
    assert results[0]["before"] == results[1]["before"], "greedy scores of one model"

    frontier = {(r["arm"], r["block"], r["threshold"]): r for r in found["frontier"]["rows"]}
    assert frontier.keys() == {(arm, b, t) for arm in ("base", "tstar") for b in (4, 8) for t in (0.5, 0.9)}
    for (arm, block), row in rows.items():
        same = frontier[arm, block, 0.9]
        assert (same["accuracy"], same["tpf"]) == (row["accuracy"], row["tpf"]), "what the run itself decoded at 0.9"
    assert frontier["base", 8, 0.5]["tpf"] > frontier["base", 8, 0.9]["tpf"]

    assert "B=8 at other thresholds" in (folder / "table.md").read_text()
    for name in ("pareto", "curves", "frontier"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
        assert "</svg>" in (folder / f"{name}.svg").read_text(), name
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5, "arms, points, curves, frontier, and when positions are revealed"
    assert 'href="cells/tstar-s2/"' in page
    assert "<td>rollout.problems</td><td>6</td>" in page

    again = experiment(tmp_path, "--table")
    assert "4 runs, 2 done" in again
    assert "started" not in again
    chosen = experiment(tmp_path, "--arms", "base,tstar")
    assert "started" not in chosen, "what is left is of another arm"
    assert "--arms tstra: no arm tstra; the file has base, tstar, broken" in experiment(
        tmp_path, "--arms", "tstra", expect=2
    )
    text = (folder / "experiment.json").read_text()
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(text.replace('"seed": 1', '"seed": 3').replace('"seed": 2', '"seed": 4'))
    experiment(tmp_path, "--table", "--join", str(elsewhere))
    four = json.loads((folder / "experiment.json").read_text())
    assert [(cell["arm"], cell["seed"]) for cell in four["cells"]] == [
        (arm, seed) for arm in ("base", "tstar") for seed in (1, 2, 3, 4)
    ]
    for had, has in ((found["rows"], four["rows"]), (found["frontier"]["rows"], four["frontier"]["rows"])):
        assert [row["seeds"] for row in has] == [4] * len(had)
        assert [row["accuracy"] for row in has] == pytest.approx([row["accuracy"] for row in had])
    assert "tstar-s1, tstar-s2 ended here or in a file before" in experiment(
        tmp_path, "--join", str(folder / "experiment.json"), expect=2
    )
    # In another folder the runs of that file count as done, and only what it lacks is begun.
    rest = experiment(tmp_path, "name=rest", "--arms", "base,tstar", "--join", str(folder / "experiment.json"))
    assert "2 runs, 0 done" in rest
    assert "started" not in rest
    moved = json.loads((folder.parent / "rest" / "experiment.json").read_text())
    assert (moved["rows"], moved["frontier"]["rows"]) == (four["rows"], four["frontier"]["rows"])

    changed = experiment(tmp_path, "settings=[rollout.problems=5]", "--table", expect=2)
    assert "was begun with other settings" in changed
