"""Weights as one flat buffer with a version and a checksum: what travels from the learner to the actors.

    learner: flatten ──► transport ──► actor: load_flat ──► checksum of what it now holds ──► proof

The order of parameters is that of ``named_parameters`` (tied ones once), the same on both sides because both
load the same checkpoint. The checksum is taken over the parameters *after* they were loaded, so equal
checksums prove what an actor serves and not only what it received (invariant 8).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Proof:
    """What an actor says it serves."""

    version: int
    """Weight version: 0 for the start model, +1 per published update."""
    checksum: str
    """CRC-32 of the flat buffer, 8 hexadecimal digits."""


def flatten(module: nn.Module) -> torch.Tensor:
    """All parameters end to end in one contiguous CPU tensor [P] of their common dtype."""
    parameters = list(module.parameters())
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) != 1:
        raise ValueError(f"parameters of several dtypes cannot share a flat buffer: {sorted(map(str, dtypes))}")
    return torch.cat([p.detach().reshape(-1) for p in parameters]).cpu()


@torch.no_grad()
def load_flat(module: nn.Module, flat: torch.Tensor) -> None:
    """Copy a buffer made by `flatten` into the parameters in place; sizes must agree exactly."""
    parameters = list(module.parameters())
    expected = sum(p.numel() for p in parameters)
    if flat.numel() != expected:
        raise ValueError(f"flat buffer holds {flat.numel()} values, the model has {expected} parameters")
    offset = 0
    for parameter in parameters:
        parameter.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()


def checksum(flat: torch.Tensor) -> str:
    """CRC-32 over the bytes of a flat CPU buffer."""
    return f"{zlib.crc32(flat.contiguous().view(torch.uint8).numpy().data):08x}"
