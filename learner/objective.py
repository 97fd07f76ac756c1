"""The TraceRL objective and group-relative advantages: pure functions, no model, no Ray, no DeepSpeed.

TraceRL (arXiv 2509.06949, eq. 3) maximises, over the tokens o_k that step t of a trajectory revealed,

    C_eps(r_k, A) - beta KL,   r_k = pi_theta(o_k | state before t) / pi_old(o_k | state before t),
    C_eps(r, A) = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

with the KL to the policy before the update estimated by k3 = exp(old - new) - 1 - (old - new) >= 0. How token
terms are weighted is decided before (`learner.packing.token_weights`). Which positions a step revealed is
taken as given, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Advantage = Literal["zscore", "mean", "leave_one_out"]
_LOG_RATIO_BOUND = 10.0


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """Per-token results, all [M]."""

    loss: torch.Tensor
    """What is minimised, before weighting: -C_eps + kl_coef * kl."""
    ratio: torch.Tensor
    """pi_theta / pi_old, detached."""
    clipped: torch.Tensor
    """bool: the clip took the gradient away."""
    kl: torch.Tensor
    """k3, detached."""


def token_terms(
    new: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> TokenTerms:
    """Loss terms of M tokens from log-probs ``new`` (with gradient) and ``old``, and advantages; all [M]."""
    log_ratio = (new - old).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    plain = ratio * advantage
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    kl = torch.exp(-log_ratio) - 1 + log_ratio
    return TokenTerms(
        loss=-torch.minimum(plain, bounded) + kl_coef * kl,
        ratio=ratio.detach(),
        clipped=(bounded < plain).detach(),
        kl=kl.detach(),
    )


def group_advantages(rewards: NDArray[np.float64], kind: Advantage) -> NDArray[np.float64]:
    """[G] rewards of one group -> [G] advantages; all zero where the group has no contrast.

    ``zscore``: (r - mean) / population std (TraceRL). ``mean``: r - mean (Dr. GRPO, arXiv 2503.20783).
    ``leave_one_out``: r - mean of the others (RLOO, arXiv 2402.14740).
    """
    centred = rewards - rewards.mean()
    if np.ptp(rewards) == 0:
        return np.zeros_like(centred)
    if kind == "zscore":
        return centred / rewards.std()
    if kind == "leave_one_out":
        return centred * len(rewards) / (len(rewards) - 1)
    return centred


def is_trainable(rewards: NDArray[np.float64], accuracy_band: tuple[float, float]) -> bool:
    """Whether a group has contrast and a mean reward inside the band, bounds included."""
    low, high = accuracy_band
    return bool(np.ptp(rewards) > 0 and low - 1e-9 <= rewards.mean() <= high + 1e-9)
