"""Intervals and summaries by numbers worked elsewhere."""

import numpy as np
import pytest
from synthetic import make_trajectory

from tstar_ray.decoding import Decoding
from tstar_ray.evaluate import summarise, wilson_interval
from tstar_ray.problems import Problem
from tstar_ray.trajectory import Group, Sample


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score interval)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


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
