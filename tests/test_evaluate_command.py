"""`python -m tstar_ray.evaluate` as a user runs it: real actors, stopped by a signal, continued."""

import json
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from jobs import environment

from tstar_ray.model import load_checkpoint
from tstar_ray.traces import read_traces
from tstar_ray.weights import checksum, flatten

pytestmark = pytest.mark.cluster
GRID = [
    "data=[{source: arithmetic, limit: 24}]",
    "grid.blocks=[4,8]",
    "grid.thresholds=[0.7,0.95]",
    "grid.orders=[learned,left_to_right]",
]


def command(folder, *settings):
    return [sys.executable, "-m", "tstar_ray.evaluate", f"folder={folder}", *GRID, *settings]


def evaluate(folder, *settings, expect=0):
    job = subprocess.run(
        command(folder, *settings),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder.parent,
        env=environment(),
        check=False,
    )
    output = job.stdout + job.stderr
    assert job.returncode == expect, output
    return output


@pytest.fixture(scope="module")
def stopped_and_continued(tmp_path_factory):
    """Ctrl-C after the third of eight cells, then the same command again."""
    folder = tmp_path_factory.mktemp("evaluation") / "cells"
    job = subprocess.Popen(
        command(folder, "actors.count=1", "actors.max_batch=1"),  # slow enough to be caught in the middle
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder.parent,
        env=environment(),
    )
    lines = []
    for line in job.stdout:
        lines.append(line)
        if "[3/8]" in line:
            job.send_signal(signal.SIGINT)
            break
    rest, _ = job.communicate(timeout=120)
    first = "".join(lines) + rest
    assert job.returncode == 130, first
    assert "the same command goes on with the cells that are left" in first
    kept = {p.name: p.read_text() for p in (folder / "cells").glob("*.json")}
    assert 3 <= len(kept) < 8
    return folder, kept, evaluate(folder)


def test_finished_cells_are_kept(stopped_and_continued):
    folder, kept, output = stopped_and_continued
    assert output.count("kept from before") == len(kept)
    assert {p.name: p.read_text() for p in (folder / "cells").glob("*.json")}.items() >= kept.items()
    document = json.loads((folder / "results.json").read_text())
    assert [c["label"] for c in document["cells"]][:2] == [
        "arithmetic, B=4, dynamic > 0.7, greedy, at most 96 new tokens",
        "arithmetic, B=4, dynamic > 0.7, forced left to right, greedy, at most 96 new tokens",
    ]
    assert len(pq.read_table(folder / "results.parquet")) == 8
    assert not list((folder / "cells").glob("*.tmp"))


def test_greedy_scores_are_the_same_from_a_straight_evaluation(stopped_and_continued, tmp_path):
    """Other actors, other batches, no stop: the same tokens."""
    folder, _, _ = stopped_and_continued
    evaluate(tmp_path / "straight", "grid.blocks=[4]", "grid.thresholds=[0.7]", "actors.count=1")
    a, b = (json.loads((f / "results.json").read_text())["cells"][:2] for f in (folder, tmp_path / "straight"))
    for one, other in zip(a, b, strict=True):
        same = {k for k in one if k not in ("tokens_per_s", "seconds")}
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
    assert a[0]["checksum"] == checksum(flatten(load_checkpoint("embedded").model))


def test_every_score_has_its_settings_and_its_traces(stopped_and_continued):
    folder, _, output = stopped_and_continued
    document = json.loads((folder / "results.json").read_text())
    assert "B=8, dynamic > 0.95, forced left to right, greedy, at most 96 new tokens" in output
    assert "weights" in output
    for cell in document["cells"]:
        groups = read_traces(folder / "traces" / f"{cell['key']}.parquet")
        trajectories = [g.samples[0].trajectory for g in groups]
        assert [int(g.samples[0].verdict == "correct") for g in groups] == list(cell["correct"])
        assert {t.block_size for t in trajectories} == {cell["cell"]["decoding"]["block_size"]}
        assert cell["mean_tokens"] == pytest.approx(sum(t.completion_len for t in trajectories) / 24)
        assert 0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1
        assert cell["tpf"] > cell["tpf_with_commits"] > 0
    areas = {tuple(c[k] for k in ("data", "block_size", "strategy", "order")): c["aup"] for c in document["curves"]}
    assert len(areas) == 4


def test_what_is_all_kept_needs_no_actors(stopped_and_continued):
    """A cluster that nobody answers at is not even looked for."""
    folder, _, output = stopped_and_continued
    again = evaluate(folder, "cluster.address=127.0.0.1:1")
    assert again.count("kept from before") == 8
    tables = [text.rpartition("arithmetic: 24 problems")[2].partition("weights")[0] for text in (again, output)]
    assert "dynamic > 0.95" in tables[0]
    assert tables[0] == tables[1]


def test_an_evaluation_that_scores_nothing_fails_in_plain_words_and_leaves_its_logs(tmp_path):
    output = evaluate(tmp_path / "x", "grid.blocks=[8]", "reward.grader=builtins:len", "actors.count=1", expect=1)
    assert "no problem could be scored; verdicts {'crashed': 72}" in output
    assert "Traceback" not in output
    assert list((tmp_path / "x" / "logs").glob("*/raylet.out")), "a private cluster's logs stay"


def test_mistakes_end_at_once(tmp_path):
    assert "no such file" in evaluate(tmp_path / "x", "data=[/nowhere/set.jsonl]", expect=2)
    assert "grid.bloks: unknown setting; did you mean blocks" in evaluate(tmp_path / "x", "grid.bloks=[4]", expect=2)
    assert "config.json" in evaluate(tmp_path / "x", "model.path=/nowhere/model", expect=2)
