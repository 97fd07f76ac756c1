"""Golden values on hand-made step maps, and every measure against plain loops on random ones."""

import itertools
import json
import math

import numpy as np
import pytest
from synthetic import make_trajectory

from tstar_ray.schedule import (
    ABSENT,
    heat_map,
    js_distance,
    left_to_right,
    measure,
    nonmono_rate,
    order_statistics,
    sub_blocks,
    view,
)


def one(step_map, *, prompt=0, length=None, block_size=4):
    return view([np.array(step_map)], [prompt], [len(step_map) if length is None else length], block_size)


def test_view_cuts_on_the_absolute_grid_and_forgets_what_follows_the_stop():
    """Prompt of 6, B=4: two prompt positions in the first block; the stop is the second token of the last block."""
    found = one([1, 2, 3, 4, 3, 5, 8, 7, 6, 6], prompt=6, length=8)
    assert found.step_KB.tolist() == [[ABSENT, ABSENT, 0, 1], [0, 1, 0, 2], [2, 1, ABSENT, ABSENT]]
    assert found.steps_K.tolist() == [2, 3, 3]


def test_view_of_smaller_blocks_in_a_larger_one_keeps_their_order():
    """B=2 seen at 4, with a terminal block that fills the larger one half."""
    found = one([2, 1, 3, 4, 5, 5], block_size=4)
    assert found.step_KB.tolist() == [[1, 0, 2, 3], [0, 0, ABSENT, ABSENT]]
    assert found.steps_K.tolist() == [4, 1]


def test_blocks_without_an_answer_token_are_left_out():
    assert len(one([1, 1, 1, 1, 2, 2, 2, 2], length=4).step_KB) == 1


@pytest.mark.parametrize(
    ("steps", "nonmono", "tau", "inversions", "anchor"),
    [
        ([1, 2, 3, 4], 0, 1, 0, 0),  # left to right
        ([1, 1, 2, 2], 0, 4 / math.sqrt(6 * 4), 0, 0),  # left to right, two at a time
        ([1, 1, 1, 1], 0, math.nan, math.nan, 0),  # all at once: nothing to compare
        ([4, 3, 2, 1], 3 / 4, -1, 1, 1),  # right to left: only the first position has nothing before it
        ([3, 1, 2, 1], 3 / 4, (1 - 4) / math.sqrt(6 * 5), 4 / 5, 1),  # up (1,2); down (3,1) (3,2) (3,1) (2,1)
        ([1, 2, 1, 3], 1 / 4, (4 - 1) / math.sqrt(6 * 5), 1 / 5, 0),  # one anchor ahead of one hole
    ],
)
def test_golden_rates(steps, nonmono, tau, inversions, anchor):
    found = measure(one(steps))
    assert found.nonmono_rate == pytest.approx(nonmono)
    assert found.kendall_tau == pytest.approx(tau, nan_ok=True)
    assert found.inversion_rate == pytest.approx(inversions, nan_ok=True)
    assert found.anchor_rate == anchor


def test_golden_counts():
    """Two blocks of 4 in 3 and 2 steps, 7 answer tokens: 7/5 a step, 7/7 with commits."""
    found = measure(one([1, 2, 1, 3, 4, 4, 5, 5], length=7))
    assert (found.blocks, found.tokens) == (2, 7)
    assert found.tokens_per_step == pytest.approx(7 / 5)
    assert found.tokens_per_forward == pytest.approx(1)
    assert found.steps_histogram == (0, 1, 1, 0)
    assert found.first_reveal == pytest.approx((2 / 4, 1 / 4, 1 / 4, 0))
    assert np.array(found.heat_map) == pytest.approx(
        np.array([[2, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]) / 7
    )


def test_golden_reordering():
    reveals = one([3, 1, 2, 1, 2, 4, 4, 1], block_size=8)
    assert left_to_right(reveals).step_KB.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    moved = sub_blocks(reveals, 4)
    assert moved.step_KB.tolist() == [[2, 0, 1, 0, 4, 5, 5, 3]]
    assert moved.steps_K.tolist() == [6]


def test_golden_distances():
    """Left to right against itself 0; disjoint distributions 1; a half overlap by hand."""
    assert measure(one([1, 2, 3, 4])).js_left_to_right == 0
    assert js_distance(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    # p = (1, 0), q = (1/2, 1/2): M = (3/4, 1/4); JSD = (log2(4/3) + (log2(2/3) + 1) / 2) / 2 = 0.311278...
    assert js_distance(np.array([1, 0.0]), np.array([0.5, 0.5])) == pytest.approx(math.sqrt(0.3112781244591328))
    # Right to left: all four cells differ from the diagonal.
    assert measure(one([4, 3, 2, 1])).js_left_to_right == 1
    # A policy that goes sub-block by sub-block already is at distance 0 of that order, and not of the other.
    inside = measure(one([2, 1, 3, 4, 6, 5, 7, 8], block_size=8))
    assert inside.js_sub_blocks == 0
    assert inside.js_left_to_right == pytest.approx(math.sqrt(0.5))


def test_stage_start_is_compared_when_given():
    start = heat_map(one([1, 2, 3, 4]))
    assert measure(one([1, 2, 3, 4]), stage_start=start).js_stage_start == 0
    assert measure(one([4, 3, 2, 1]), stage_start=start).js_stage_start == 1
    assert measure(one([1, 2, 3, 4])).js_stage_start is None
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(one([1] * 8, block_size=8), stage_start=start)


def test_nothing_to_measure_is_said():
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(view([], [], [], 4))


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16])
def test_measures_equal_plain_loops(block_size):
    rng = np.random.default_rng(block_size)
    trajectories = [
        make_trajectory(rng, prompt_len=int(rng.integers(1, 40)), blocks=int(rng.integers(1, 5)), block_size=block_size)
        for _ in range(60)
    ]
    found = measure(
        view(
            [t.step_map for t in trajectories],
            [t.prompt_len for t in trajectories],
            [t.completion_len for t in trajectories],
            block_size,
        )
    )
    nonmono, taus, inverted, comparable, anchors, tokens, steps, blocks = [], [], 0, 0, [], 0, 0, 0
    for t in trajectories:
        by_block = {}
        every = {}
        for i, step in enumerate(t.step_map.tolist()):
            every.setdefault((t.prompt_len + i) // block_size, set()).add(step)
            if i < t.completion_len:
                by_block.setdefault((t.prompt_len + i) // block_size, []).append(step)
        for block, order in by_block.items():
            blocks += 1
            steps += len(every[block])
            tokens += len(order)
            for i, step in enumerate(order):
                nonmono.append(any(order[j] > step for j in range(i)))
            up = sum(a < b for a, b in itertools.combinations(order, 2))
            down = sum(a > b for a, b in itertools.combinations(order, 2))
            pairs = len(order) * (len(order) - 1) // 2
            if up + down:
                taus.append((up - down) / math.sqrt(pairs * (up + down)))
            inverted += down
            comparable += up + down
            if len(order) >= 2:
                anchors.append(order[0] != min(every[block]))
    assert (found.blocks, found.tokens) == (blocks, tokens)
    assert found.tokens_per_step == pytest.approx(tokens / steps)
    assert sum(found.steps_histogram) == blocks
    assert found.nonmono_rate == pytest.approx(np.mean(nonmono))
    assert found.kendall_tau == pytest.approx(np.mean(taus) if taus else math.nan, nan_ok=True)
    assert found.inversion_rate == pytest.approx(inverted / comparable if comparable else math.nan, nan_ok=True)
    assert found.anchor_rate == pytest.approx(np.mean(anchors) if anchors else math.nan, nan_ok=True)
    assert np.sum(found.heat_map) == pytest.approx(1)
    json.dumps(found.to_dict(), allow_nan=False)


def test_tau_b_equals_published_example():
    """Ties on one side: steps 1 1 2 2 3 against positions 0..4: C = 8, D = 0, tau-b = 8 / sqrt(10 * 8)."""
    tau, inversions = order_statistics(one([1, 1, 2, 2, 3], block_size=8))
    assert (tau, inversions) == (pytest.approx(8 / math.sqrt(80)), 0)


def test_left_to_right_is_monotone_and_keeps_tokens_per_step():
    rng = np.random.default_rng(5)
    t = make_trajectory(rng, prompt_len=5, blocks=9, block_size=16)
    reveals = view([t.step_map], [t.prompt_len], [t.completion_len], 16)
    moved = left_to_right(reveals)
    assert nonmono_rate(moved) == 0 < nonmono_rate(reveals)
    for a, b in zip(reveals.step_KB, moved.step_KB):
        assert sorted(a) == sorted(b)
        assert ((a == ABSENT) == (b == ABSENT)).all()
    # Inside a sub-block everything keeps its order; sub-blocks come one after the other.
    inside = sub_blocks(reveals, 4)
    for before, after in zip(reveals.step_KB, inside.step_KB):
        for start in range(0, 16, 4):
            a, b = before[start : start + 4], after[start : start + 4]
            for i, j in itertools.combinations(range(4), 2):
                assert np.sign(a[i] - a[j]) == np.sign(b[i] - b[j])
            rest = after[start + 4 :]
            assert (rest[rest != ABSENT] > b.max()).all()
