"""Weights from the learner to the actors, through Ray's object store.

    learner rank 0: publish(flat, version) ──► Published (version, checksum, box) ──► fetch in every actor
    actor pool: serve(published)           ──► each loads and answers with a Proof; equal ones may work

One flat buffer is stored once; actors on one node map the same memory. An actor that starts late or anew just
fetches the newest. The object lives as long as a `Published` refers to it and its owner, the process that
called `publish`, lives; a learner that was rebuilt publishes again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tstar_ray.weights import Proof, checksum

_FETCH_S = 600.0


@dataclass(frozen=True, slots=True)
class Published:
    """Weights in the object store."""

    version: int
    """0 for the start model, +1 per update."""
    checksum: str
    """Of the flat buffer; see `tstar_ray.weights.checksum`."""
    size_bytes: int
    """Of the flat buffer."""
    dtype: str
    """torch name of its element type, e.g. bfloat16."""
    box: tuple[Any, ...]
    """One object reference, wrapped so that Ray does not fetch it when this travels."""

    @property
    def proof(self) -> Proof:
        """What an actor that serves it must answer."""
        return Proof(self.version, self.checksum)


class ObjectStoreTransport:
    """Works everywhere Ray does, and for actors that come and go. Stateless: every process makes its own."""

    def publish(self, flat: torch.Tensor, version: int) -> Published:
        """Store a flat CPU buffer; NumPy travels without copies, and bfloat16 as 16-bit integers."""
        import ray

        wire = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat
        reference = ray.put(wire.numpy())
        name = str(flat.dtype).removeprefix("torch.")
        return Published(version, checksum(flat), flat.numel() * flat.itemsize, name, (reference,))

    def fetch(self, published: Published) -> torch.Tensor:
        """The buffer, mapped from shared memory; read it, do not write to it."""
        import ray

        array = ray.get(published.box[0], timeout=_FETCH_S)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable")
            flat = torch.from_numpy(array)
        return flat.view(torch.bfloat16) if published.dtype == "bfloat16" else flat
