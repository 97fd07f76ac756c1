"""The engine's benchmarks run, on a small scale, and their script goes on where one of them fails."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from pretend_cuda import CUDA, PretendCuda

from benchmarks import checks, launches, rollout, shapes

ROOT = Path(__file__).parents[2]


def test_rollout_compares_the_same_tokens_decoded_in_every_way(tmp_path):
    arguments = "--model embedded --blocks 4 --schedules static --prompts 8 --prompt 12 --new-tokens 40"
    arguments += f" --plain-prompts 4 --max-batch 8 --repeats 1 --cuda-graphs --out {tmp_path / 'found.json'}"
    rollout.main(arguments.split())
    [row] = json.loads((tmp_path / "found.json").read_text())["results"]
    [engine] = row["engine"]
    assert engine["continuous"]["tokens"] == engine["shrinking"]["tokens"]
    assert engine["graphs"]["tokens"] == engine["continuous"]["tokens"]
    assert engine["graphs"]["graphed"] > engine["graphs"]["forwards"] / 2
    assert engine["graphs_times_faster"] == engine["graphs"]["tokens_per_s"] / engine["continuous"]["tokens_per_s"]
    assert row["plain"]["mean_tokens"] == pytest.approx(engine["continuous"]["mean_tokens"], rel=0.15)
    assert row["plain"]["forwards"] > row["plain"]["tokens"], "a pass for each token, and for each commit"
    assert engine["continuous"]["forwards"] < engine["continuous"]["tokens"] / 4
    assert engine["times_faster_than_plain"] == engine["continuous"]["tokens_per_s"] / row["plain"]["tokens_per_s"]


def test_on_a_gpu_it_tells_the_share_of_what_the_hardware_could_do(tmp_path, monkeypatch):
    """As gpu.sh calls it, on a pretended one."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", (64, 2, 4, 2, 16, 96, 512))
    arguments = f"--model tiny --device {CUDA} --blocks 4 --schedules static --steps 4 --prompts 6 --prompt 12"
    arguments += " --new-tokens 16 --lengths fixed --max-batch 4 --cache-gb 0.1 --repeats 1 --only-engine --cuda-graphs"
    with PretendCuda() as cuda:
        rollout.main([*arguments.split(), "--out", str(tmp_path / "found.json")])
    assert sum(graph.replays for graph in cuda.graphs) > 20
    [row] = json.loads((tmp_path / "found.json").read_text())["results"]
    [engine] = row["engine"]
    for run in (engine["continuous"], engine["graphs"]):
        assert 0 < run["roofline"]["share"] < 1
        assert run["tokens"] == engine["continuous"]["tokens"]


def test_kernels_of_a_pass_are_counted_and_its_products_add_up(tmp_path):
    launches.main(["--model", "8M", "--rows", "16", "--keys", "64", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    hidden, layers, heads, kv_heads, dim, mlp, _ = shapes.SHAPES["8M"]
    weights = layers * hidden * (2 * (heads + kv_heads) * dim + 3 * mlp)
    for runs, tokens in ((found[:6], 64), (found[6:], 128)):
        modules, _, padded, even, kernels, even_kernels = runs
        assert modules["kernels"] > 1.4 * padded["kernels"]
        assert padded["kernels"] == even["kernels"] + 3 * layers, "queries are not padded, and results not picked"
        assert padded["kernels"] >= kernels["kernels"] + 11 * layers
        assert even["kernels"] >= even_kernels["kernels"] + 9 * layers
        assert modules["gib"] > padded["gib"] > even["gib"] > even_kernels["gib"] > 2 * weights / 2**30
        assert {round(run["tflop"] * 1e12) for run in runs} == {2 * weights * tokens}


def test_what_fails_on_a_gpu_is_named_and_the_others_are_measured(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$2" >> "$LOG"\n[ "$2" != benchmarks.checks ]\n')
    python.chmod(0o755)
    found = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", tmp_path],
        env=os.environ | {"PYTHON": str(python), "LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (1, "failed: checks\n")
    assert (tmp_path / "log").read_text().split() == [
        "benchmarks.checks",
        "benchmarks.rollout",
        "benchmarks.rollout",
        "benchmarks.learner",
    ]
    assert checks.run(0, lambda: 0) == {"found": 0, "bound": 0, "holds": True}
    assert not checks.run(0, lambda: 1)["holds"]
    result = checks.run(0, lambda: 1 // 0)
    assert not result["holds"]
    assert "ZeroDivisionError" in result["error"]
