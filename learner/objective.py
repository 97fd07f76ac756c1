"""The TraceRL objective: pure functions of log-probs, no model, no Ray, no DeepSpeed.

TraceRL (arXiv 2509.06949, eq. 3) maximises, over the tokens o_k that step t of a trajectory revealed,

    C_eps(r_k, A) - beta KL,   r_k = pi_theta(o_k | state before t) / pi_old(o_k | state before t),
    C_eps(r, A) = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

Which positions a step revealed is taken as given, as in the paper. How token terms are weighted is decided
before (`learner.packing.token_weights`), what a token is credited with too (`learner.credit`).

**Three policies.** pi_theta is trained; pi_old is the learner's own before the update; pi_recorded is the
engine's, whose log-probs the trajectory carries. They agree up to rounding when rollouts are fresh; where
they do not, `importance` weights C_eps by pi_old / pi_recorded, over a token, a denoising step (the set of
tokens it revealed) or a whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["k1", "k2", "k3"]
_LOG_RATIO_BOUND = 10.0


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """Per-token results, all [M]."""

    loss: torch.Tensor
    """What is minimised, before weighting: -importance * C_eps + kl_coef * kl."""
    ratio: torch.Tensor
    """pi_theta / pi_old, detached."""
    clipped: torch.Tensor
    """bool: the clip took the gradient away."""
    kl: torch.Tensor
    """Estimate of the KL to the reference policy, detached."""


def token_terms(
    new: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: KLEstimator = "k3",
    reference: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> TokenTerms:
    """Loss terms of M tokens; all arguments [M], only ``new`` with gradient.

    ``reference`` are log-probs of the policy the KL is taken to (None: ``old``), ``importance`` weights of
    the surrogate (None: 1).
    """
    log_ratio = (new - old).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    plain = ratio * advantage
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    surrogate = torch.minimum(plain, bounded)
    kl = kl_terms(new, old if reference is None else reference, kl_estimator)
    return TokenTerms(
        loss=kl_coef * kl - (surrogate if importance is None else importance * surrogate),
        ratio=ratio.detach(),
        clipped=(bounded < plain).detach(),
        kl=kl.detach(),
    )


def kl_terms(new: torch.Tensor, reference: torch.Tensor, estimator: KLEstimator = "k3") -> torch.Tensor:
    """Estimates of KL(pi || reference) at tokens drawn from pi (J. Schulman, "Approximating KL divergence").

    With d = log pi - log reference: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d >= 0.
    """
    d = (new - reference).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.exp(-d) - 1 + d


@torch.no_grad()
def importance(
    old: torch.Tensor,
    recorded: torch.Tensor,
    sample: torch.Tensor,
    step: torch.Tensor,
    *,
    level: Literal["token", "step", "sequence"],
    mode: Literal["clip", "mask"],
    bound: float,
) -> torch.Tensor:
    """Weights [M] that correct for tokens drawn from ``recorded`` instead of ``old``.

    The ratio old / recorded is multiplied over the token alone, over the tokens with equal (``sample``,
    ``step``), or over those of the ``sample``; whole samples must be given. ``clip``: min(ratio, bound), a
    truncated importance weight; ``mask``: 1 where the ratio lies in [1 / bound, bound], else 0.
    """
    log_ratio = (old - recorded).double()
    if level != "token":
        key = sample if level == "sequence" else sample * (int(step.max()) + 1) + step
        _, group = key.unique(return_inverse=True)
        sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64, device=old.device)
        log_ratio = sums.index_add(0, group, log_ratio)[group]
    ratio = log_ratio.clamp(-2 * _LOG_RATIO_BOUND, 2 * _LOG_RATIO_BOUND).exp()
    weight = ratio.clamp(max=bound) if mode == "clip" else (ratio >= 1 / bound) & (ratio <= bound)
    return weight.to(old.dtype)


def value_terms(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Clipped value loss [M]: max((V - R)^2, (V_old + clip(V - V_old) - R)^2) / 2 (algorithm reference 2.9)."""
    near = old + (new - old).clamp(-clip, clip)
    return torch.maximum((new - returns).square(), (near - returns).square()) / 2
