"""The boundary between the Ray layer and whatever decodes blocks.

An engine takes requests and decoding settings, returns one trajectory a request, and serves the weights it
proved. The Ray actor around it knows nothing of attention, caches or devices; an engine knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine was built."""

    completion_tokens: int = 0
    """Tokens of finished completions."""
    sequences: int = 0
    """Finished completions."""
    forwards: int = 0
    """Denoising passes over the batch; each also commits the blocks that the pass before finished."""
    prefills: int = 0
    """Passes over prompts."""
    sequence_steps: int = 0
    """Denoising steps summed over sequences: ``sequence_steps / forwards`` is the mean batch occupancy."""
    seconds: float = 0.0
    """Wall time spent in `Engine.generate`."""


class Engine(Protocol):
    """A block-diffusion decoder."""

    @property
    def proof(self) -> Proof:
        """Version and checksum of the weights it serves."""

    @property
    def stats(self) -> EngineStats:
        """Totals so far."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """One trajectory a request, in order. The block size may differ between calls."""

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """Take new weights (see `tstar_ray.weights`), drop every cache, and prove what is now served."""
