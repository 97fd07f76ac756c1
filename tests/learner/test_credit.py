"""Advantages and GAE against plain recursions and numbers worked by hand."""

import math

import numpy as np
import pytest
from synthetic import make_trajectory

from learner.credit import credit, gae, group_advantages, is_trainable, speed_advantages
from tstar_ray.config_learner import LossConfig
from tstar_ray.problems import Problem
from tstar_ray.trajectory import Group, Sample, tokens_per_forward


def make_group(rewards, seed=0):
    rng = np.random.default_rng(seed)
    samples = [
        Sample(make_trajectory(rng, prompt_len=3, blocks=4, block_size=4, sample=i), "", "", float(r))
        for i, r in enumerate(rewards)
    ]
    return Group(0, Problem("0", "", ""), tuple(samples))


@pytest.mark.parametrize(
    ("rewards", "kind", "expected"),
    [
        ([1, 0, 0, 0], "zscore", [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ([1, 0, 0, 0], "mean", [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ([1, 1, 1], "zscore", [0, 0, 0]),
        ([0, 0], "leave_one_out", [0, 0]),
    ],
)
def test_trap_37_advantages_use_the_population_deviation(rewards, kind, expected):
    np.testing.assert_allclose(group_advantages(np.array(rewards, dtype=float), kind), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "band", "kept"),
    [(0.2, (0.2, 0.8), True), (0.8, (0.2, 0.8), True), (0.1, (0.2, 0.8), False), (0.9, (0.2, 0.8), False)],
)
def test_trap_37_band_bounds_are_kept(mean, band, kept):
    rewards = np.arange(10) < round(mean * 10)
    assert is_trainable(make_group(rewards), LossConfig(accuracy_band=band)) is kept


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_trap_38_groups_without_contrast_are_never_trained(value):
    assert not is_trainable(make_group([value] * 8), LossConfig())


def test_speed_is_standardised_among_correct_samples_and_slow_right_answers_are_not_punished():
    tpf, correct = np.array([2.0, 4.0, 9.0, 1.0]), np.array([True, True, False, False])
    np.testing.assert_allclose(speed_advantages(tpf, correct), [0, 1, 0, 0])
    # mean 3, population deviation sqrt(2)
    found = speed_advantages(np.array([1.0, 3.0, 3.0, 5.0]), np.ones(4, bool))
    np.testing.assert_allclose(found, [0, 0, 0, np.sqrt(2)])
    np.testing.assert_allclose(speed_advantages(tpf, np.array([True, False, False, False])), 0)


def test_speed_is_added_to_the_advantage_and_gives_all_correct_groups_contrast():
    group = make_group([1, 1, 1, 0])
    speeds = np.array([tokens_per_forward([s.trajectory], commits=False) for s in group.samples])
    found = credit(group, LossConfig(speed_coef=0.25))
    expected = group_advantages(group.rewards, "zscore")
    expected[:3] += 0.25 * np.clip((speeds[:3] - speeds[:3].mean()) / speeds[:3].std(), 0, None)
    np.testing.assert_allclose(found, expected)
    perfect = make_group([1, 1, 1, 1])
    assert not is_trainable(perfect, LossConfig())
    assert is_trainable(perfect, LossConfig(speed_coef=0.25))
    assert not is_trainable(perfect, LossConfig(speed_coef=0.25, accuracy_band=(0.2, 0.8)))


def test_imitation_credits_right_answers_alone_and_needs_no_contrast():
    band = LossConfig(accuracy_band=(0.2, 0.8), speed_coef=0.25)
    np.testing.assert_array_equal(credit(make_group([1, 0, 1, 1]), band, "imitation"), [1, 0, 1, 1])
    assert is_trainable(make_group([1, 1, 1, 1]), band, "imitation")
    assert not is_trainable(make_group([0, 0, 0, 0]), LossConfig(), "imitation")


STEPS = np.array([0, 0, 1, 2, 2, 2])


def test_trap_44_closed_form_at_one_one_is_reward_minus_value():
    values = np.random.default_rng(0).normal(size=6)
    advantages, returns = gae(values, STEPS, 1.7, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, 1.7)
    np.testing.assert_allclose(advantages, 1.7 - values)


def test_trap_44_closed_form_at_one_zero_is_the_difference_to_the_next_step():
    values = np.random.default_rng(0).normal(size=6)
    advantages, returns = gae(values, STEPS, 1.7, gamma=1.0, lam=0.0)
    following = np.array([values[2], values[2], values[3:].mean(), 0, 0, 0])
    earned = np.array([0, 0, 0, 1.7, 1.7, 1.7])
    np.testing.assert_allclose(advantages, earned - values + following)
    np.testing.assert_allclose(returns, 1.7)


def test_trap_44_three_steps_by_hand():
    """gamma .9, lambda .8, reward 2, step means V* = .5, 1, .25 (tokens .4/.6, 1, .25)."""
    values, steps = np.array([0.4, 0.6, 1.0, 0.25]), np.array([0, 0, 1, 2])
    advantages, returns = gae(values, steps, 2.0, gamma=0.9, lam=0.8)
    last = 2 - 0.25
    middle = -1 + 0.9 * 0.25 + 0.72 * last
    np.testing.assert_allclose(
        advantages, [-0.4 + 0.9 * 1 + 0.72 * middle, -0.6 + 0.9 * 1 + 0.72 * middle, middle, last]
    )
    np.testing.assert_allclose(returns, [0.81 * 2, 0.81 * 2, 0.9 * 2, 2])


def test_trap_44_recursion_follows_denoising_order_not_position():
    """The same tokens listed in another order get the same credit."""
    values, order = np.random.default_rng(1).normal(size=6), np.array([5, 0, 3, 2, 4, 1])
    straight = gae(values, STEPS, 1.0, gamma=0.9, lam=0.7)
    shuffled = gae(values[order], STEPS[order], 1.0, gamma=0.9, lam=0.7)
    for a, b in zip(straight, shuffled):
        np.testing.assert_allclose(a[order], b)
