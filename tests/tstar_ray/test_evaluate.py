"""Summaries by numbers worked by hand."""

import numpy as np
import pytest
from synthetic import make_trajectory

from tstar_ray.decoding import Decoding
from tstar_ray.evaluate import summarise
from tstar_ray.problems import Problem
from tstar_ray.trajectory import Group, Sample


def test_summary_counts_every_sample():
    rng = np.random.default_rng(0)
    trajectories = [make_trajectory(rng, prompt_len=p, blocks=2, block_size=4) for p in (3, 4, 9)]
    verdicts = ["correct", "wrong", "correct"]
    groups = [
        Group(i, Problem(str(i), "", ""), (Sample(t, "", v, float(v == "correct")),))
        for i, (t, v) in enumerate(zip(trajectories, verdicts))
    ]
    found = summarise(groups, Decoding(block_size=4, max_new_tokens=8, stop_ids=(0,)), unscored=2)
    assert (found.problems, found.unscored, found.accuracy) == (3, 2, pytest.approx(2 / 3))
    tokens = sum(t.completion_len for t in trajectories)
    steps = sum(int(t.step_map.max()) for t in trajectories)
    assert found.tpf == pytest.approx(tokens / steps)
    assert found.tpf_with_commits == pytest.approx(tokens / (steps + 6))
    assert found.mean_tokens == pytest.approx(tokens / 3)
    assert found.truncated == 0.0
