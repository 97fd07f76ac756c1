"""Weights as one flat buffer with a version and a checksum: what travels from the learner to the actors.

    learner: flatten ──► transport ──► actor: load_flat ──► checksum of what it now holds ──► proof

The order of parameters is that of ``named_parameters`` (tied ones once), the same on both sides because both
load the same checkpoint. The checksum is taken over the parameters *after* they were loaded, so equal
checksums prove what an actor serves and not only what it received (invariant 8). It is computed where the
parameters are, so that on a GPU proving costs a reading of its memory and no transfer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

_WORD, _ROW = 8, 1024
"""Bytes of a word of the checksum; words that are summed along rows and columns."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What an actor says it serves."""

    version: int
    """Weight version: 0 for the start model, +1 per published update."""
    checksum: str
    """See `checksum`; 16 hexadecimal digits."""


def whole_numel(parameter: nn.Parameter) -> int:
    """Values of a parameter, also where DeepSpeed left a shard of it (ZeRO-3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@torch.no_grad()
def flatten(
    module: nn.Module, out: torch.Tensor | None = None, whole: Iterable[nn.Parameter] | None = None
) -> torch.Tensor:
    """All parameters end to end in one contiguous CPU tensor [P] of their common dtype: ``out``, a buffer that was
    returned before, if it is given, since fresh memory costs more than the copy. Where parameters are shards (ZeRO-3),
    ``whole`` gives them in the same order, each whole until the next is asked for. Makes no second copy on a GPU."""
    parameters = list(module.parameters())
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) != 1:
        raise ValueError(f"parameters of several dtypes cannot share a flat buffer: {sorted(map(str, dtypes))}")
    sizes = [whole_numel(p) for p in parameters]
    if out is None:
        out = torch.empty(sum(sizes), dtype=parameters[0].dtype, pin_memory=parameters[0].is_cuda)
    for parameter, part in zip(parameters if whole is None else whole, out.split(sizes)):
        part.view_as(parameter).copy_(parameter)
    return out


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
    """Of the bytes of a flat buffer, on any device; see `checksum_parts`."""
    return checksum_parts([flat])


@torch.no_grad()
def checksum_parts(parts: Iterable[torch.Tensor]) -> str:
    """`checksum` of all parts end to end without joining them, as of ``module.parameters()``. Fletcher's two sums
    over 64-bit words, modulo 2**64, and the length: a change of a word, of its place or of the end shows in them."""
    plain = weighted = words = length = 0
    rest = torch.empty(0, dtype=torch.uint8)
    for part in parts:
        data = part.detach().contiguous().reshape(-1).view(torch.uint8)
        length += len(data)
        if len(rest):
            data = torch.cat([rest.to(data.device), data])
        elif data.storage_offset() % _WORD:
            data = data.clone()
        whole = len(data) // _WORD * _WORD
        rest = data[whole:]
        sums = _sums(data[:whole].view(torch.int64))
        plain, weighted = plain + sums[0], weighted + sums[1] + words * sums[0]
        words += whole // _WORD
    last = int.from_bytes(bytes(rest.tolist()), "little")
    found = (plain + last, weighted + words * last, length)
    packed = b"".join((number % 2**64).to_bytes(8, "little") for number in found)
    return hashlib.blake2b(packed, digest_size=8).hexdigest()


def _sums(words: torch.Tensor) -> tuple[int, int]:
    """Sum of int64 [N], and of its elements times their index, both modulo 2**64; reads twice and copies nothing."""
    rows = len(words) // _ROW
    square = words[: rows * _ROW].view(rows, _ROW)
    by_row, by_column, tail = square.sum(1), square.sum(0), words[rows * _ROW :]
    index = torch.arange(max(rows, _ROW), device=words.device)
    weighted = _ROW * (by_row * index[:rows]).sum() + (by_column * index[:_ROW]).sum()
    weighted += (tail * (index[: len(tail)] + rows * _ROW)).sum()
    return int(by_column.sum() + tail.sum()), int(weighted)
