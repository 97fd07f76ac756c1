"""Trajectories: what a rollout hands to rewards and to the learner.

    Request ──engine──► Trajectory ──reward──► Sample ──┐
                                     Sample ──┼──► Group ──► learner, disk (tstar_ray.traces)
                                     Sample ──┘

Token ids go end to end: text exists only for the verifier and for people. A trajectory holds the whole
terminal block, because tokens after the stop were visible when those before it were revealed, so that the
learner can replay every conditional exactly (algorithm reference, traps 13 and 14).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstar_ray.blocks import check_step_map
from tstar_ray.decoding import Variant
from tstar_ray.problems import Problem


@dataclass(frozen=True, slots=True)
class Request:
    """One completion asked of an engine."""

    group_id: int
    """The dispatched group it belongs to; unique in a run."""
    sample: int
    """Index inside the group; a replacement gets a new one."""
    prompt_ids: tuple[int, ...]
    """[P] prompt token ids, chat template applied."""
    seed: int
    """Seed of this sample's own random stream; two samples of one prompt have different ones."""
    max_new_tokens: int | None = None
    """A cap of its own below that of the decoding settings."""
    variant: Variant | None = None
    """What it does otherwise than the decoding settings."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One decoded completion with its decoding trace. P prompt tokens, T tokens in all, C completion tokens."""

    group_id: int
    """From the request."""
    sample: int
    """From the request."""
    token_ids: NDArray[np.int32]
    """[T] prompt, completion, and what else the terminal block holds; T is a multiple of ``block_size``."""
    prompt_len: int
    """P."""
    completion_len: int
    """C: tokens up to and including the stop token; at most T - P."""
    step_map: NDArray[np.int32]
    """[T - P] the 1-based global denoising step that revealed each token."""
    logprobs: NDArray[np.float32]
    """[T - P] log-prob (nats) of each token when it was revealed, under the untruncated softmax at
    ``temperature`` (at 1 where decoding was greedy)."""
    block_size: int
    """B the rollout ran with."""
    temperature: float
    """Sampling temperature; 0 is greedy."""
    weight_versions: NDArray[np.int64]
    """[decoded blocks] oldest version of the weights that revealed a token of each block."""
    stop_reason: str
    """``stop`` (a stop token) or ``length`` (the cap)."""
    stale_cache: bool = False
    """Whether weights changed on the way and keys and values of the older ones stayed in use; where False, each
    log-prob is exactly that of the weights that drew the token."""

    @property
    def denoising_steps(self) -> int:
        """Forward passes that revealed tokens."""
        return int(self.step_map.max())

    @property
    def blocks(self) -> int:
        """Decoded blocks; a decoder with separate commits spends one more forward on each."""
        return (len(self.token_ids) - self.prompt_len // self.block_size * self.block_size) // self.block_size

    @property
    def completion_ids(self) -> NDArray[np.int32]:
        """[C] tokens of the answer, the stop token included."""
        return self.token_ids[self.prompt_len : self.prompt_len + self.completion_len]

    @property
    def oldest_version(self) -> int:
        """The oldest weights that decoded any of its blocks."""
        return int(self.weight_versions.min())

    def validate(self) -> Trajectory:
        """Return itself, or raise ValueError naming what is broken."""
        total, prompt = len(self.token_ids), self.prompt_len
        if total % self.block_size:
            raise ValueError(f"{total} tokens do not end on the grid of block size {self.block_size}")
        if not 0 < self.completion_len <= total - prompt:
            raise ValueError(f"completion of {self.completion_len} tokens, {total - prompt} decoded")
        for name in ("step_map", "logprobs"):
            if len(getattr(self, name)) != total - prompt:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {total - prompt} tokens")
        if len(self.weight_versions) != self.blocks:
            raise ValueError(f"{len(self.weight_versions)} weight versions for {self.blocks} blocks")
        if not np.isfinite(self.logprobs).all():
            raise ValueError("a log-prob is not finite")
        check_step_map(self.step_map, prompt, self.block_size)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A trajectory with its verdict."""

    trajectory: Trajectory
    text: str
    """The decoded completion, without the stop token."""
    verdict: str
    """How verification ended (``reward.grading.Verdict``), or ``truncated``: right, but cut at the length cap where
    such completions earn nothing (``reward.score_truncated``)."""
    reward: float
    """What the answer earned; samples without a reward never get here."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The samples of one problem; advantages are relative to them."""

    group_id: int
    """Unique in a run."""
    problem: Problem
    """What was asked."""
    samples: tuple[Sample, ...]
    """G samples, all with a reward, all of one block size."""

    @property
    def rewards(self) -> NDArray[np.float64]:
        """[G]."""
        return np.asarray([sample.reward for sample in self.samples], dtype=np.float64)


def tokens_per_forward(trajectories: Iterable[Trajectory], *, commits: bool) -> float:
    """TPF: completion tokens / forward passes over all trajectories; with ``commits``, one more pass a block."""
    tokens = forwards = 0
    for trajectory in trajectories:
        tokens += trajectory.completion_len
        forwards += trajectory.denoising_steps + (trajectory.blocks if commits else 0)
    return tokens / forwards if forwards else 0.0
