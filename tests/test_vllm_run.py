"""A whole T* run with vLLM in its rollout actors, as a user starts it; in the environment of ``./tstar vllm``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import needs_vllm

from tstar_ray.traces import read_traces

pytestmark = [pytest.mark.cluster, needs_vllm]
SETTINGS = [
    "actors.engine=vllm",
    "actors.count=2",
    "actors.max_batch=32",
    "data.max_prompt_tokens=64",
    "curriculum.blocks=[4,8]",
    "curriculum.updates=[3,2]",
    "rollout.problems=6",
    "rollout.group_size=4",
    "eval.problems=12",
    "eval.every=0",
    "cluster.start_timeout_s=600",
]


def run(folder, *settings):
    return command(folder, "tstar_ray.run", f"run.dir={folder}", "run.name=job", *settings)


def command(folder, module, *settings):
    return subprocess.run(
        [sys.executable, "-m", module, *settings],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            "RAY_raylet_start_wait_time_s": "300",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        check=False,
    )


def test_two_vllm_actors_through_several_weight_updates_and_a_stage_change(tmp_path):
    """The start-up replay check at both block sizes, five published versions proven by both actors, 4 to 8."""
    job = run(tmp_path, *SETTINGS)
    output = job.stdout + job.stderr
    assert job.returncode == 0, output
    for block in (4, 8):
        assert f"replay check at B={block}" in output
    folder = tmp_path / "job"
    updates = [
        record
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "update"
    ]
    assert [record["stage"] for record in updates] == ["b4", "b4", "b4", "b8", "b8"]
    for number in range(1, 6):
        for group in read_traces(folder / "traces" / f"update-{number:05d}.parquet"):
            for sample in group.samples:
                assert set(sample.trajectory.validate().weight_versions.tolist()) == {number - 1}
                assert sample.trajectory.block_size == (4 if number <= 3 else 8)
                assert not sample.trajectory.stale_cache
    result = json.loads((folder / "result.json").read_text())
    assert all(0 <= entry["accuracy"] <= 1 for entry in result["before"] + result["after"])
    errors = [record["learner/replay_error"] for record in updates if record.get("learner/replay_error") is not None]
    assert errors, "recorded log-probs were compared"
    assert max(errors) < 1e-4


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("actors.vllm.tensor_parallel=2", "divides the 3 heads, 1 key-value heads"),
        ("actors.vllm.memory_share=0.5", "set actors.cache_gb instead"),
    ],
)
def test_what_cannot_be_served_ends_the_run_before_it_begins(tmp_path, setting, told):
    job = run(tmp_path, *SETTINGS, setting)
    assert job.returncode == 2
    assert told in job.stderr
    assert "Traceback" not in job.stderr


EVALUATION = ["data=[{source: arithmetic, limit: 8}]", "grid.blocks=[4,8]", "actors.count=1", "actors.engine=vllm"]


def test_an_evaluation_at_several_block_sizes(tmp_path):
    """Every cell is scored: vLLM is started for the largest of them."""
    job = command(tmp_path, "tstar_ray.evaluate", "folder=e", *EVALUATION, "cluster.start_timeout_s=600")
    assert job.returncode == 0, job.stdout + job.stderr
    cells = json.loads((tmp_path / "e" / "results.json").read_text())["cells"]
    assert [cell["cell"]["decoding"]["block_size"] for cell in cells] == [4, 8]
    assert [cell["problems"] for cell in cells] == [8, 8]


def test_an_evaluation_that_vllm_cannot_serve_ends_before_it_begins(tmp_path):
    job = command(tmp_path, "tstar_ray.evaluate", "folder=e", *EVALUATION, "actors.vllm.tensor_parallel=2")
    assert job.returncode == 2
    assert "divides the 3 heads, 1 key-value heads" in job.stderr
    assert "Traceback" not in job.stderr
