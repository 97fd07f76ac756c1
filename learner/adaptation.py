"""Block-diffusion SFT: how an autoregressive model learns to fill masked blocks. NumPy only.

    (ids, prompt length) ──fill to the grid──► noise at rate p(t) ──► slices behind one clean copy ──► weights

A sample is laid out as TraceRL's trajectories are (`learner.packing`), with one slice for each block that holds a
mask: the published [noisy | clean] rows (SDAR, arXiv 2510.06303; algorithm reference 3.2), without the noisy copies of
blocks that have nothing to predict and without the clean copy of the last one. Block k of the noisy copy sees the clean
blocks before k and itself. The prompt is never masked; its tail shares the first block, on the absolute grid.

**Loss.** t ~ U(0, 1), for each sample or each block; every answer token is masked with probability p(t); the loss is
the cross-entropy of masked tokens over p, unshifted, divided by the number of answer tokens of the optimizer step. That
is a bound on the negative log-likelihood per token, exact for one-token blocks at p = 1, where it is the
autoregressive one.

**Fill.** Answers are filled with end-of-text to the end of their last block, and the fill is trained like the rest, so
that a decoder that has ended a sentence in mid-block completes the block (SDAR pads the same way).

**Block sizes.** Each part of the training has a mixture; one size is drawn for every optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from learner.packing import SlicedSample, lay_out
from tstar_ray.blocks import Slices, ceil_to_block

if TYPE_CHECKING:
    from tstar_ray.config_adapt import BlockStage, NoiseConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised training text."""

    ids: NDArray[np.int32]
    """[L] prompt and answer, its end-of-text included."""
    prompt_len: int
    """Tokens that are context only; 0 for plain text."""

    def answer_tokens(self, block_size: int) -> int:
        """What is trained of it, the fill included."""
        return ceil_to_block(len(self.ids), block_size) - self.prompt_len


def mask_rate(t: Floats, noise: NoiseConfig) -> Floats:
    """p(t): low + (high - low) s(t), where s is the schedule."""
    s = {"linear": t, "cosine": 1 - np.cos(math.pi / 2 * t), "square": 1 - (1 - t) ** 2}[noise.schedule]
    return noise.low + (noise.high - noise.low) * s


def mask_weight(t: Floats, noise: NoiseConfig) -> Floats:
    """What the cross-entropy of a masked token is multiplied with; see `NoiseConfig.weighting`."""
    if noise.weighting == "none":
        return np.ones_like(t)
    rate = mask_rate(t, noise)
    if noise.weighting == "ratio":
        return 1 / rate
    slope = {"linear": np.ones_like(t), "cosine": math.pi / 2 * np.sin(math.pi / 2 * t), "square": 2 * (1 - t)}
    return (noise.high - noise.low) * slope[noise.schedule] / rate


def fill(example: Example, block_size: int, fill_id: int) -> NDArray[np.int64]:
    """[T] the example's ids, filled to the end of its last block."""
    ids = np.full(ceil_to_block(len(example.ids), block_size), fill_id, dtype=np.int64)
    ids[: len(example.ids)] = example.ids
    return ids


def draw_mask(
    example: Example, *, block_size: int, noise: NoiseConfig, rng: np.random.Generator, t: float | None = None
) -> tuple[NDArray[np.bool_], Floats]:
    """Which of the T filled positions are masked, and the weight of each [T]. ``t``: not drawn, but given."""
    total = ceil_to_block(len(example.ids), block_size)
    block = np.arange(total) // block_size
    draws = rng.random(1 if noise.per == "sample" else total // block_size)
    t_T = np.full(total, draws[0]) if noise.per == "sample" else draws[block]
    if t is not None:
        t_T = np.full(total, t)
    answer = np.arange(total) >= example.prompt_len
    return answer & (rng.random(total) < mask_rate(t_T, noise)), mask_weight(t_T, noise)


def noisy_sample(
    ids: NDArray[np.int64], masked: NDArray[np.bool_], weight: Floats, *, prompt_len: int, block_size: int, mask_id: int
) -> tuple[SlicedSample, NDArray[np.float32]] | None:
    """Lay out [T] filled ids with their mask; returns the weight of each target [M] too. None: nothing is masked."""
    masked_kB = masked.reshape(-1, block_size)
    blocks = np.flatnonzero(masked_kB.any(1))
    if not len(blocks):
        return None
    slices = Slices(
        block=blocks,
        step=np.arange(1, len(blocks) + 1),
        noisy=np.where(masked_kB, mask_id, ids.reshape(-1, block_size))[blocks],
        target=masked_kB[blocks],
    )
    sample = lay_out(slices, ids, prompt_len=prompt_len)
    return sample, weight[prompt_len + sample.target_offset].astype(np.float32)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step does."""

    block_size: int
    """B of every sample of the step."""
    lr: float
    """Learning rate."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Block sizes and learning rates over all steps; a function of the seed and the step alone."""

    ends: tuple[int, ...]
    """Step at which each stage ends; the last one is the number of steps."""
    mixtures: tuple[dict[int, float], ...]
    """Of each stage: block size -> share."""
    lr: float
    """Peak learning rate."""
    warmup: int
    """Steps of linear warm-up."""
    final_lr: float
    """Last learning rate over the peak."""
    seed: int
    """Of the draws."""

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.ends[-1]

    def stage(self, step: int) -> int:
        """Index of the stage that step 0 … steps-1 belongs to."""
        return next(i for i, end in enumerate(self.ends) if step < end)

    def plan(self, step: int) -> StepPlan:
        """Step 0 … steps-1."""
        mixture = self.mixtures[self.stage(step)]
        shares = np.array(list(mixture.values()))
        block = np.random.default_rng([self.seed, step, 1]).choice(list(mixture), p=shares / shares.sum())
        if step < self.warmup:
            return StepPlan(int(block), self.lr * (step + 1) / (self.warmup + 1))
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        fall = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return StepPlan(int(block), self.lr * fall)


def make_schedule(
    stages: Sequence[BlockStage], *, samples: int, batch: int, lr: float, warmup: float, final_lr: float, seed: int
) -> Schedule:
    """Resolve stages on ``samples`` training samples; ``warmup`` is a share of all steps."""
    counts = [stage.steps or max(1, math.ceil(stage.epochs * samples / batch)) for stage in stages]
    ends = tuple(int(end) for end in np.cumsum(counts))
    mixtures = tuple(stage.mixture for stage in stages)
    return Schedule(ends, mixtures, lr, math.ceil(warmup * ends[-1]), final_lr, seed)


def batch_indices(step: int, *, batch: int, samples: int, seed: int) -> list[int]:
    """Which samples step 0, 1, … trains on: shuffled epochs, end to end; a function of its arguments alone."""
    orders: dict[int, NDArray[np.int64]] = {}
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, samples)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch, 2]).permutation(samples)
        found.append(int(orders[epoch][index]))
    return found
