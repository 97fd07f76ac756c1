"""The objective against plain loops and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from learner.objective import importance, kl_terms, token_terms, value_terms
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


def test_kl_estimators_equal_their_definitions_and_agree_in_the_mean():
    """Over draws from pi, k1 and k3 estimate KL(pi || reference) without bias."""
    rng = np.random.default_rng(0)
    policy, reference = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5) * 20)
    drawn = rng.choice(5, 200_000, p=policy)
    new, ref = torch.tensor(np.log(policy)[drawn]), torch.tensor(np.log(reference)[drawn])
    exact = float((policy * np.log(policy / reference)).sum())
    assert kl_terms(new, ref, "k1").mean().item() == pytest.approx(exact, abs=0.02)
    assert kl_terms(new, ref, "k3").mean().item() == pytest.approx(exact, abs=0.02)
    d = np.log(policy / reference)[drawn]
    np.testing.assert_allclose(kl_terms(new, ref, "k2").numpy(), d * d / 2)


def test_kl_to_another_reference_leaves_the_ratio_alone():
    new, old, ref = (torch.tensor([v], dtype=torch.float64) for v in (-1.0, -1.0, -3.0))
    terms = token_terms(
        new, old, torch.ones(1), clip_low=0.2, clip_high=0.2, kl_coef=0.5, kl_estimator="k1", reference=ref
    )
    assert terms.ratio.item() == 1.0
    assert terms.loss.item() == pytest.approx(-1 + 0.5 * 2)


SAMPLE, STEP = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 1])
GAP = [0.5, 0.5, -0.2, -0.9, 0.1]
"""log pi_old - log pi_recorded of five tokens of two samples."""


@pytest.mark.parametrize(
    ("level", "products"),
    [
        ("token", GAP),
        ("step", [1.0, 1.0, -0.2, -0.9, 0.1]),
        ("sequence", [0.8, 0.8, 0.8, -0.8, -0.8]),
    ],
)
def test_importance_grid_against_plain_products(level, products):
    old = torch.tensor(GAP, dtype=torch.float64)
    arguments = (old, torch.zeros(5, dtype=torch.float64), SAMPLE, STEP)
    clipped = importance(*arguments, level=level, mode="clip", bound=2.0)
    np.testing.assert_allclose(clipped.numpy(), [min(math.exp(g), 2.0) for g in products])
    masked = importance(*arguments, level=level, mode="mask", bound=2.0)
    np.testing.assert_array_equal(masked.numpy(), [0.5 <= math.exp(g) <= 2.0 for g in products])


def test_importance_weights_the_surrogate_and_not_the_kl():
    new = torch.tensor([-1.0, -1.0], requires_grad=True)
    weight = torch.tensor([0.0, 3.0])
    terms = token_terms(
        new, torch.full((2,), -1.5), torch.ones(2), clip_low=0.9, clip_high=9.0, kl_coef=0.1, importance=weight
    )
    ratio = math.exp(0.5)
    kl = math.exp(-0.5) - 1 + 0.5
    np.testing.assert_allclose(terms.loss.detach().numpy(), [0.1 * kl, 0.1 * kl - 3 * ratio], rtol=1e-6)


def test_trap_45_value_loss_table():
    """Value, value before, return -> loss, at clip .2."""
    rows = [
        (1.0, 1.0, 3.0, 2.0),
        (2.0, 1.0, 3.0, (1.2 - 3) ** 2 / 2),
        (0.0, 1.0, 3.0, 4.5),
        (3.1, 1.0, 1.0, 2.1**2 / 2),
    ]
    new, old, returns, expected = (torch.tensor(column) for column in zip(*rows))
    np.testing.assert_allclose(value_terms(new, old, returns, 0.2).numpy(), expected.numpy(), rtol=1e-6)
