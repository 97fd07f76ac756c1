"""A GPU box may have torch and transformers alone: engine and learner mathematics must run there."""

import json
import subprocess
import sys
from pathlib import Path

BEYOND_TORCH = ("ray", "deepspeed", "vllm", "pydantic", "pyarrow", "omegaconf", "math_verify", "tensorboard")
RUN_WITHOUT = """
import sys, runpy
for name in {names}:
    sys.modules[name] = None
sys.argv = ["benchmarks.checks", "--device", "cpu"]
runpy.run_module("benchmarks.checks", run_name="__main__")
"""


def test_engine_and_learner_mathematics_run_with_torch_and_transformers_alone():
    code = RUN_WITHOUT.format(names=BEYOND_TORCH)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads(done.stdout)["results"]
    assert all(result["holds"] for result in results.values()), results
    assert results["tokens_that_differ"]["found"] == 0
    assert results["replay_fp32"]["found"] < 1e-4
    assert results["gradient_fp32"]["found"] < 1e-4
