"""Statistics by numbers worked elsewhere, by hand, or by simulation."""

import itertools
import math

import numpy as np
import pytest

from tstar_ray.scores import (
    aup,
    clustered_interval,
    drawdown,
    drift,
    frontier,
    over_seeds,
    pass_at_k,
    spikes,
    wilson_interval,
)


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


def test_one_sample_a_problem_is_the_plain_interval():
    assert clustered_interval([1.0] * 81 + [0.0] * 182) == pytest.approx(wilson_interval(81, 263))
    assert clustered_interval([1.0] * 9) == wilson_interval(9, 9)
    assert clustered_interval([]) == (0.0, 1.0)


def test_samples_that_agree_add_nothing_and_independent_ones_count_in_full():
    same = [1.0] * 30 + [0.0] * 70
    assert clustered_interval(same, samples=8) == pytest.approx(wilson_interval(30, 100))
    # 100 problems of equal difficulty, 4 samples: 25 each of 1, 2, 3 right out of 4, ... mean 1/2, binomial spread.
    counts = [0] * 6 + [1] * 25 + [2] * 38 + [3] * 25 + [4] * 6
    low, high = clustered_interval([c / 4 for c in counts], samples=4)
    assert high - low == pytest.approx(np.diff(wilson_interval(200, 400))[0], rel=0.02)


def test_the_clustered_interval_covers_as_it_says():
    """500 evaluations of 60 problems of very different difficulty, 8 samples: 95 % hold the true mean, and the
    interval that takes samples as independent holds it far less often."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(500):
        difficulty = rng.beta(0.4, 0.4, 60)
        right = rng.binomial(8, difficulty)
        low, high = clustered_interval((right / 8).tolist(), samples=8)
        covered += low <= 0.5 <= high
        low, high = wilson_interval(right.sum(), 480)
        naive += low <= 0.5 <= high
    assert 0.92 <= covered / 500 <= 0.98
    assert naive / 500 < 0.75


@pytest.mark.parametrize(("correct", "samples", "k"), [(0, 4, 2), (1, 4, 2), (3, 5, 3), (4, 4, 1), (2, 6, 6)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(correct, samples, k):
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(1, 4, 5)


def test_aup_worked_example():
    """Three points by hand: 80 at 2, 78 at 4, 70 at 6; the last is 10 below the first and dropped. Best of all: 90.

    2 x 80 = 160; weights exp(-3 (1 - 80/90)) = exp(-1/3) and exp(-3 (1 - 78/90)) = exp(-0.4);
    (4 - 2) x (80 exp(-1/3) + 78 exp(-0.4)) / 2 = 57.3225... + 52.2849... = 109.6075...
    """
    points = [(4.0, 78.0), (2.0, 80.0), (6.0, 70.0)]
    assert aup(points, best=90.0) == pytest.approx(160 + 57.322505 + 52.284964, abs=1e-4)
    # Its own best is 80: the first weight is 1, and the second exp(-3 x 2/80).
    assert aup(points) == pytest.approx(160 + 80 + 78 * math.exp(-0.075))


def test_aup_edges():
    assert aup([(3.0, 50.0)]) == 150
    assert aup([(1.0, 60.0), (2.0, 55.0)], best=60) == pytest.approx(60 + (60 + 55 * math.exp(-0.25)) / 2)
    assert aup([(1.0, 0.0), (2.0, 0.0)]) == 0
    assert aup([(1.0, 50.0), (2.0, 54.0)], best=50) == pytest.approx(50 + (50 + 54) / 2), "no weight exceeds 1"
    with pytest.raises(ValueError, match="no points"):
        aup([])


def test_frontier_keeps_what_nothing_beats():
    points = [(1, 90), (2, 80), (2, 85), (3, 80), (2.5, 79), (4, 60), (3.5, 60)]
    assert [points[i] for i in frontier(points)] == [(1, 90), (2, 85), (3, 80), (4, 60)]


def test_drawdown_and_spikes():
    assert drawdown([0.5, 0.6, 0.4, 0.7, 0.65]) == pytest.approx(0.2)
    assert drawdown([0.1, 0.2, 0.3]) == drawdown([]) == 0
    assert spikes([1, 1, 1, 5, 5.1]) == 1
    assert spikes([]) == 0


def test_faster_but_worse_needs_both_and_more_than_noise():
    fast = [2.0] * 5 + [2.5] * 5
    assert drift([0.6] * 5 + [0.5] * 5, fast).faster_but_worse
    assert not drift([0.6] * 5 + [0.61] * 5, fast).faster_but_worse
    assert not drift([0.6] * 5 + [0.5] * 5, [2.0] * 10).faster_but_worse
    noisy = [0.9, 0.3, 0.6, 0.9, 0.3, 0.8, 0.2, 0.5, 0.8, 0.2]
    assert not drift(noisy, fast).faster_but_worse
    assert drift([0.5], [2.0]) is None
    found = drift([0.5, 0.7, 0.9, 0.1], [1, 1, 2, 2], window=2)
    assert (found.accuracy, found.tpf_ratio) == (pytest.approx(-0.1), 2)
    assert found.error == pytest.approx(math.sqrt((0.02 + 0.32) / 2))


def test_over_seeds():
    found = over_seeds([0.5, 0.6, 0.7])
    assert (found.mean, found.worst, found.seeds) == (pytest.approx(0.6), 0.5, 3)
    assert found.deviation == pytest.approx(0.1)
    assert math.isnan(over_seeds([0.5]).deviation)
