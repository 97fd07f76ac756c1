"""The baselines that ignore the decoding trace: random and coupled masking (algorithm reference 2.10).

A token is scored from a state in which a random part of its block is masked, instead of from the state it was
decoded from. The rate u ~ U(0.1, 0.9) is drawn for each sample, every token of the answer is masked with
probability u, and the blocks before stay clean, as in semi-autoregressive decoding.

    random     one slice a block: the masked tokens are its targets; the others are never scored
    coupled    two slices a block: the mask and its complement; every token is scored once (DiffuCoder, arXiv
               2506.20639)

Tokens after the stop are masked like the others and never targets. Both run through the same packing, loss
and trainer as the trace.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tstar_ray.blocks import Slices, ceil_to_block
from tstar_ray.trajectory import Trajectory

RATE = (0.1, 0.9)


def mask_slices(
    trajectory: Trajectory,
    *,
    block_size: int,
    mask_id: int,
    kind: Literal["random", "coupled"],
    rng: np.random.Generator,
) -> Slices:
    """Slices of one trajectory with random masks; `Slices.step` counts them."""
    total, prompt = len(trajectory.token_ids), trajectory.prompt_len
    padded = ceil_to_block(total, block_size)
    ids = np.full(padded, mask_id, dtype=np.int64)
    ids[:total] = trajectory.token_ids
    position = np.arange(padded)
    beyond = position >= total  # a bridge's last block: never revealed
    is_target = (position >= prompt) & (position < prompt + trajectory.completion_len)
    chosen = rng.random(padded) < rng.uniform(*RATE)
    masks = [chosen] if kind == "random" else [chosen, ~chosen]
    found = []
    for k in range(prompt // block_size, padded // block_size):
        span = slice(k * block_size, (k + 1) * block_size)
        for mask in masks:
            masked = (mask & (position >= prompt)) | beyond
            if (masked & is_target)[span].any():
                found.append((k, np.where(masked, mask_id, ids)[span], (masked & is_target)[span]))
    if not found:  # a short answer at a low rate: mask all of it rather than lose the sample
        answer = (position >= prompt) | beyond
        k = prompt // block_size
        span = slice(k * block_size, (k + 1) * block_size)
        found.append((k, np.where(answer, mask_id, ids)[span], is_target[span]))
    blocks, noisy, target = zip(*found)
    return Slices(np.array(blocks), np.arange(1, len(found) + 1), np.array(noisy), np.array(target))
