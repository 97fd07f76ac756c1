"""The boundary between rollout actors and whatever decodes for them.

    rollout actor ──requests, decoding settings──► engine ──trajectories──► rollout actor
                  ──flat weights, version────────►        ──proof────────►

The Ray actor knows nothing of attention, caches and devices; an engine knows nothing of Ray, rewards and stages.
Calls may come from several threads: requests of all of them are decoded together, and weights are taken between
two denoising steps, so that publishing never waits for a sequence to end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof

UNPROVEN = Proof(-1, "")
"""Of an engine whose weights are not known, since an update of them failed: older than any that are asked for."""


class CancelledError(RuntimeError):
    """What was asked for is no longer wanted."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was built."""

    completion_tokens: int = 0
    """Tokens of finished completions."""
    sequences: int = 0
    """Finished completions."""
    blocks: int = 0
    """Blocks of finished completions."""
    denoising_steps: int = 0
    """Denoising steps of finished completions."""
    forwards: int = 0
    """Passes that denoise; each also commits what the pass before finished and reads what prompts are new."""
    prefills: int = 0
    """Passes that only read prompts, or read again what new weights made stale."""
    graphed: int = 0
    """Of the passes that denoise, those of a fixed shape, replayed from a CUDA graph on a GPU."""
    forwarded_tokens: int = 0
    """Query tokens of all passes."""
    sequence_steps: int = 0
    """Sequences summed over the passes that denoise."""
    forward_seconds: float = 0.0
    """Time in the model up to its last hidden states; on a GPU the time to launch it, what it computes is waited for in
    ``sampling_seconds``."""
    sampling_seconds: float = 0.0
    """Time in the LM head, sampling and unmasking, and for a GPU to get to the end of the step."""
    host_seconds: float = 0.0
    """Time spent on admission, bookkeeping and trajectories."""

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self.forwards + self.prefills

    @property
    def seconds(self) -> float:
        """Wall time of all work."""
        return self.forward_seconds + self.sampling_seconds + self.host_seconds

    @property
    def occupancy(self) -> float:
        """Mean sequences in a pass."""
        return self.sequence_steps / max(1, self.forwards)

    @property
    def steps_per_block(self) -> float:
        """Mean denoising steps of a finished block."""
        return self.denoising_steps / max(1, self.blocks)

    def tokens_per_forward(self, *, commits: bool) -> float:
        """TPF of one sequence; with ``commits`` as a decoder counts that commits each block in a pass of its own."""
        return self.completion_tokens / max(1, self.denoising_steps + self.blocks * commits)


class Engine(Protocol):
    """A block-diffusion decoder. Calls may come from several threads; what they ask is decoded together."""

    @property
    def proof(self) -> Proof:
        """Version and checksum of the weights it serves."""

    @property
    def stats(self) -> EngineStats:
        """Totals so far."""

    @property
    def broken(self) -> bool:
        """Whether it will never decode again: a process that it needs is gone, or its device failed for good."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """One trajectory a request, in order. The block size may differ between calls."""

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Trajectory]:
        """The same trajectories as they finish; closing the iterator gives up the rest."""

    def cancel(self, group_ids: Collection[int]) -> None:
        """Give up what was asked for these groups; calls that wait for any of it raise `CancelledError`."""

    def paused(self) -> AbstractContextManager[None]:
        """Between two denoising steps: nothing is decoded while the context is open."""

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """Take new weights (see `tstar_ray.weights`) between two denoising steps, and prove what is now served.

        Sequences under way go on with the new weights.
        """

    def sleep(self) -> None:
        """Give the memory of the caches back until there is work again. Raises RuntimeError while work is under way."""
