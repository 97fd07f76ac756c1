"""One denoising step of sequences that share decoding settings: the part that all engines have in common.

hidden states of M masked positions ──► LM head ──► draw ──► choose ──► tokens, log-probs, which are revealed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tstar_ray.decoding import Decoding
from tstar_ray.unmask import choose, draw, lottery, uniforms

LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
"""Logits held at a time, by device type."""


@dataclass(frozen=True, slots=True)
class Positions:
    """M masked positions of S blocks, all [M] int64 on the device."""

    seed: torch.Tensor
    """Of the sequence's random stream."""
    position: torch.Tensor
    """In the sequence."""
    step: torch.Tensor
    """1-based denoising step of the sequence."""
    dense: torch.Tensor
    """Flat index into [S, B]."""


@dataclass(frozen=True, slots=True)
class Revealed:
    """What a step did to each of M masked positions, on the device."""

    token: torch.Tensor
    """[M] drawn."""
    logprob: torch.Tensor
    """[M] of it."""
    mask: torch.Tensor
    """bool [M]: whether it was revealed."""


def denoise(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    at: Positions,
    masked: NDArray[np.bool_],
    block_step: NDArray[np.int64] | torch.Tensor,
    decoding: Decoding,
    *,
    vocabulary: int,
) -> Revealed:
    """``logits`` maps hidden states to logits that may be overwritten; ``hidden`` [M, H] are those of the masked
    positions, ``masked`` [S, B] of blocks that have taken ``block_step`` [S] steps; the latter may be on the device,
    where nothing is uploaded then."""
    device = hidden.device
    token, logprob, confidence, entropy = _draw(
        logits, hidden, uniforms(at.seed, at.position, at.step), decoding, vocabulary
    )
    steps = block_step if isinstance(block_step, torch.Tensor) else to_device(block_step, device)
    base, extra = divmod(decoding.block_size, decoding.steps)
    quota = base + (steps < extra).long()  # `Decoding.quota` of every block
    masked_SB = torch.zeros(masked.shape, dtype=torch.bool, device=device)
    masked_SB.view(-1)[at.dense] = True
    confidence_SB, entropy_SB = (torch.zeros(masked.shape, device=device) for _ in range(2))
    confidence_SB.view(-1)[at.dense] = confidence
    entropy_SB.view(-1)[at.dense] = entropy
    lottery_SB = None
    if decoding.order == "random":
        lottery_SB = torch.zeros(masked.shape, device=device)
        lottery_SB.view(-1)[at.dense] = lottery(at.seed, at.position)
    mask_SB = choose(
        masked_SB,
        confidence_SB,
        entropy_SB,
        quota,
        decoding,
        lottery_SB,
    )
    return Revealed(token=token, logprob=logprob, mask=mask_SB.view(-1)[at.dense])


def _draw(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    uniform: torch.Tensor,
    decoding: Decoding,
    vocabulary: int,
) -> tuple[torch.Tensor, ...]:
    """Token, log-prob, confidence and entropy [M], with the LM head a bounded number of logits at a time."""
    size = rows_at_once(hidden.device, vocabulary)
    parts = []
    for h, u in zip(hidden.split(size), uniform.split(size)):
        found = draw(logits(h), u, decoding)
        parts.append((found.token, found.logprob, found.confidence, found.entropy))
    return tuple(torch.cat(values) for values in zip(*parts))


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: from pageable memory it would. On CPU the array itself."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """Positions whose logits are held at a time."""
    return max(32, LOGITS_AT_ONCE[device.type] // vocabulary)


def send_together(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of any shapes on the device, in one transfer."""
    flat = to_device(np.concatenate([array.ravel() for array in arrays]), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]
