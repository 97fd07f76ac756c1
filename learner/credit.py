"""Credit: what a sample, and with a value model each of its tokens, is credited with. NumPy only.

rewards of a group ──► group_advantages [G] ──► every token of a sample
                               └─ value model: reward of the last denoising step ──► gae ──► each token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tstar_ray.trajectory import Group, tokens_per_forward

if TYPE_CHECKING:
    from tstar_ray.config_learner import LossConfig

Advantage = Literal["zscore", "mean", "leave_one_out"]
Objective = Literal["policy", "imitation"]
Floats = NDArray[np.float64]


def group_advantages(rewards: Floats, kind: Advantage) -> Floats:
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


def speed_advantages(tpf: Floats, correct: NDArray[np.bool_]) -> Floats:
    """[G] tokens per forward -> among the correct samples the z-score where it is positive, else 0.

    Standardised apart from correctness, so that neither term drowns the other (LightningRL, arXiv 2603.13319);
    a wrong answer earns nothing by being fast. A right answer loses nothing by being slow: its tokens are right as
    well, and pushing them down undoes the confidence that the fast ones gain (docs/results.md).
    """
    scores = np.zeros(len(tpf))
    if correct.sum() > 1:
        scores[correct] = np.maximum(group_advantages(tpf[correct], "zscore"), 0)
    return scores


def credit(group: Group, loss: LossConfig, objective: Objective = "policy") -> Floats:
    """[G] advantages of a group's samples; ``imitation``: 1 where the answer is right, else 0 (expert iteration:
    ReST-EM, arXiv 2312.06585)."""
    if objective == "imitation":
        return (group.rewards > 0).astype(np.float64)
    advantages = group_advantages(group.rewards, loss.advantage)
    if loss.speed_coef:
        tpf = np.array([tokens_per_forward([s.trajectory], commits=False) for s in group.samples])
        advantages = advantages + loss.speed_coef * speed_advantages(tpf, group.rewards > 0)
    return advantages


def is_trainable(group: Group, loss: LossConfig, objective: Objective = "policy") -> bool:
    """Whether a group teaches anything (some advantage is not 0) and, for a policy gradient, its mean reward lies
    inside the band."""
    low, high = loss.accuracy_band
    within = objective == "imitation" or low - 1e-9 <= group.rewards.mean() <= high + 1e-9
    return bool(within and credit(group, loss, objective).any())


def gae(
    values: Floats, step: Sequence[int] | NDArray[np.integer], reward: float, *, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Advantages and returns [M] of one trajectory's tokens from their values (TraceRL; algorithm reference 2.9).

    ``values`` [M] and ``step`` [M], 0 … S-1 in the order of denoising. V*_t is the mean value of step t, and
    every token of the last step earns ``reward``. Over steps, backwards:

        R*_t = r*_t + gamma R*_{t+1}        A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lam A*_{t+1}

    and for a token j of step t:  R_j = r_j + gamma R*_{t+1},  A_j = r_j - V_j + gamma V*_{t+1} + gamma lam A*_{t+1}.
    """
    step = np.asarray(step)
    steps = int(step.max()) + 1
    mean = np.bincount(step, weights=values, minlength=steps) / np.bincount(step, minlength=steps)
    rewards = np.zeros(steps)
    rewards[-1] = reward
    # What follows step t: return, value and advantage of step t + 1, zero after the last.
    returns, following, ahead = (np.zeros(steps + 1) for _ in range(3))
    following[:steps] = mean
    for t in reversed(range(steps)):
        returns[t] = rewards[t] + gamma * returns[t + 1]
        ahead[t] = rewards[t] - mean[t] + gamma * following[t + 1] + gamma * lam * ahead[t + 1]
    later = step + 1
    token_returns = rewards[step] + gamma * returns[later]
    advantages = rewards[step] - values + gamma * following[later] + gamma * lam * ahead[later]
    return advantages, token_returns


def token_credit(
    values: Floats, sample: NDArray[np.integer], step: NDArray[np.integer], reward: Floats, *, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """`gae` of the tokens of several whole samples, in any order; all [M], ``reward`` that of the token's sample."""
    advantages, returns = np.empty(len(values)), np.empty(len(values))
    for one in np.unique(sample):
        where = sample == one
        advantages[where], returns[where] = gae(
            values[where], step[where], float(reward[where][0]), gamma=gamma, lam=lam
        )
    return advantages, returns
