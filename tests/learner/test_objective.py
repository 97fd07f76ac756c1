"""The objective against plain loops and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from learner.objective import group_advantages, is_trainable, token_terms
from learner.packing import SlicedSample, token_weights


def plain_loss(new, old, advantage, clip_low, clip_high, kl_coef):
    """TraceRL eq. 3, one token at a time in Python floats."""
    losses = []
    for n, o, a in zip(new, old, advantage):
        ratio = math.exp(n - o)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        kl = math.exp(o - n) - 1 - (o - n)
        losses.append(-min(ratio * a, clipped * a) + kl_coef * kl)
    return losses


def test_terms_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    new, old, advantage = rng.normal(-1, 1, 200), rng.normal(-1, 1, 200), rng.normal(0, 1, 200)
    terms = token_terms(*(torch.tensor(x) for x in (new, old, advantage)), clip_low=0.2, clip_high=0.3, kl_coef=0.05)
    expected = plain_loss(new, old, advantage, 0.2, 0.3, 0.05)
    np.testing.assert_allclose(terms.loss.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.5, 1.0, -1.3, True, False),  # already far enough up
        (0.5, 1.0, -0.5, False, True),
        (0.5, -1.0, 0.8, True, False),  # already far enough down
        (1.5, -1.0, 1.5, False, True),
        (1.0, 2.0, -2.0, False, True),
    ],
)
def test_asymmetric_clip_table(ratio, advantage, loss, clipped, gradient):
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    terms = token_terms(
        new, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), clip_low=0.2, clip_high=0.3, kl_coef=0.0
    )
    terms.loss.sum().backward()
    assert terms.loss.item() == pytest.approx(loss)
    assert bool(terms.clipped) is clipped
    assert (new.grad.abs().item() > 0) is gradient


def test_trap_39_k3_is_nonnegative_with_zero_value_and_gradient_at_equality():
    new = (torch.arange(-30, 31, dtype=torch.float64) / 10).requires_grad_()
    terms = token_terms(new, torch.zeros(61).double(), torch.zeros(61), clip_low=0.2, clip_high=0.2, kl_coef=1.0)
    terms.loss.sum().backward()
    assert (terms.kl >= 0).all()
    assert terms.kl[30] == 0
    assert new.grad[30] == 0
    # d/dnew of exp(old - new) - 1 + new - old, by hand
    np.testing.assert_allclose(new.grad.numpy(), 1 - np.exp(-new.detach().numpy()), atol=1e-12)


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
    rewards = np.zeros(10)
    rewards[: round(mean * 10)] = 1
    assert is_trainable(rewards, band) is kept


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_groups_without_contrast_are_never_trained(value):
    assert not is_trainable(np.full(8, value), (0.0, 1.0))


def sample_of(slice_sizes):
    """A sample whose slices have the given numbers of targets; nothing else of it matters here."""
    target_slice = np.repeat(np.arange(len(slice_sizes)), slice_sizes)
    empty = np.zeros(len(target_slice), dtype=np.int64)
    return SlicedSample(*(empty,) * 6, target_slice, empty, empty, empty)


@pytest.mark.parametrize(
    ("normaliser", "first", "second"),
    [
        # two samples with steps of 2, 3, 1 and of 2 tokens (trap 36)
        ("token_mean", [1 / 8] * 6, [1 / 8] * 2),
        ("seq_mean", [1 / 12] * 6, [1 / 4] * 2),
        ("const_len", [1 / 20] * 6, [1 / 20] * 2),
        ("per_step_mean", [1 / 12, 1 / 12, 1 / 18, 1 / 18, 1 / 18, 1 / 6], [1 / 4] * 2),
        ("paper_sum", [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 2], [1 / 4] * 2),
    ],
)
def test_trap_36_golden_token_weights(normaliser, first, second):
    weights = token_weights([sample_of([2, 3, 1]), sample_of([2])], normaliser, length_norm=10)
    np.testing.assert_allclose(weights[0], first, rtol=1e-6)
    np.testing.assert_allclose(weights[1], second, rtol=1e-6)
