"""The arithmetic of block diffusion: the absolute grid, step maps, slices, and who attends to whom.

Everything an engine and the learner must agree on stands here once, in NumPy and PyTorch only.

**Grid.** Block k of size B holds positions kB … kB+B-1, counted from the first prompt token, so a prompt
whose length is no multiple of B leaves a *tail* in the first block that is decoded (SDAR's sampler and SFT;
algorithm reference 2.6).

**Visibility.** A query sees every clean position of earlier blocks and all of its own block::

    decoding            key position < (query position // B + 1) * B
    training, clean     clean keys of blocks <= its own
    training, slice     clean keys of blocks < its own, and the keys of the very same slice

**Slices.** Training replays a trajectory one denoising step at a time. A slice is one block as the model saw
it just before a step: positions revealed at that step or later are masked, and those revealed at that step
(and before the stop) are its targets. With shrink s, every s consecutive steps of a block merge into the last
of them (TraceRL, arXiv 2509.06949, section 4). Each completion token is a target exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
BoolArray = NDArray[np.bool_]

NEVER = np.iinfo(np.int32).max
"""Step id of a position that no step of the trajectory revealed (it stays masked in every slice)."""


def ceil_to_block(length: int, block_size: int) -> int:
    """The first grid line at or after ``length`` tokens."""
    return -(-length // block_size) * block_size


def decode_limit(prompt_len: int, max_new_tokens: int, block_size: int) -> int:
    """Where decoding must end: the last grid line within ``prompt_len + max_new_tokens`` tokens.

    The length cap is aligned *down* so that a length stop never cuts a block. Raises ValueError when not
    even the first block fits.
    """
    limit = (prompt_len + max_new_tokens) // block_size * block_size
    if limit <= prompt_len:
        need = ceil_to_block(prompt_len + 1, block_size) - prompt_len
        raise ValueError(
            f"max_new_tokens={max_new_tokens} does not complete one block of {block_size} after a prompt of "
            f"{prompt_len} tokens; use at least {need}"
        )
    return limit


@dataclass(frozen=True, slots=True)
class Slices:
    """The training view of one trajectory at one block size; n slices of B positions."""

    block: IntArray
    """[n] index of the block on the grid, ascending."""
    step: IntArray
    """[n] global denoising step each slice stands for (the last of its group under shrink)."""
    noisy: IntArray
    """[n, B] token ids with the mask token at every position not yet revealed."""
    target: BoolArray
    """[n, B] positions whose token this step revealed and whose log-prob is trained."""


def build_slices(
    *,
    token_ids: IntArray,
    step_map: IntArray,
    prompt_len: int,
    completion_len: int,
    block_size: int,
    mask_id: int,
    shrink: int = 1,
) -> Slices:
    """Cut one trajectory into slices.

    ``token_ids`` [T] are prompt, completion and the rest of the terminal block; ``step_map`` [T - prompt_len]
    the 1-based global steps. Tokens after the stop (``prompt_len + completion_len`` on) stay visible once
    revealed but are never targets. T must be a multiple of the rollout block; where the training block is
    larger (a bridge), the rest of its last block is masked and never revealed.
    """
    total = len(token_ids)
    padded = ceil_to_block(total, block_size)
    ids = np.full(padded, mask_id, dtype=np.int64)
    ids[:total] = token_ids
    steps = np.zeros(padded, dtype=np.int64)
    steps[prompt_len:total] = step_map
    steps[total:] = NEVER
    is_target = np.zeros(padded, dtype=bool)
    is_target[prompt_len : prompt_len + completion_len] = True

    blocks: list[int] = []
    slice_steps: list[int] = []
    noisy: list[IntArray] = []
    target: list[BoolArray] = []
    for k in range(prompt_len // block_size, padded // block_size):
        span = slice(k * block_size, (k + 1) * block_size)
        merged = merge_steps(steps[span], shrink)
        for step in np.unique(merged[(merged > 0) & (merged < NEVER)]):
            hit = (merged == step) & is_target[span]
            if hit.any():
                blocks.append(k)
                slice_steps.append(int(step))
                noisy.append(np.where(merged >= step, mask_id, ids[span]))
                target.append(hit)
    shape = (len(blocks), block_size)
    return Slices(
        block=np.asarray(blocks, dtype=np.int64),
        step=np.asarray(slice_steps, dtype=np.int64),
        noisy=np.asarray(noisy, dtype=np.int64).reshape(shape),
        target=np.asarray(target, dtype=bool).reshape(shape),
    )


def merge_steps(steps: IntArray, shrink: int) -> IntArray:
    """Map the revealed steps of one block, in order and in groups of ``shrink``, to the last of each group.

    0 (prompt) and NEVER are left alone. ``[1, 3, 2, 4, 4]`` with shrink 2 becomes ``[2, 4, 2, 4, 4]``.
    """
    if shrink == 1:
        return steps
    revealed = (steps > 0) & (steps < NEVER)
    values, rank = np.unique(steps[revealed], return_inverse=True)
    last_of_group = np.minimum((rank // shrink + 1) * shrink - 1, len(values) - 1)
    merged = steps.copy()
    merged[revealed] = values[last_of_group]
    return merged


def check_step_map(step_map: IntArray, prompt_len: int, block_size: int) -> None:
    """Raise ValueError unless the steps are positive and every block's are all later than the block's before."""
    if (step_map < 1).any():
        raise ValueError(f"step map holds {int(step_map.min())}; steps are counted from 1")
    block = (prompt_len + np.arange(len(step_map))) // block_size
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    if len(starts) > 1:
        first = np.minimum.reduceat(step_map, starts)
        last = np.maximum.reduceat(step_map, starts)
        if (first[1:] <= last[:-1]).any():
            bad = int(block[starts[1:]][first[1:] <= last[:-1]][0])
            raise ValueError(f"step map runs backwards: block {bad} has a step no later than the block before it")


def decode_visibility(key_count: int, visible_end: torch.Tensor) -> torch.Tensor:
    """[...] exclusive ends of what each query sees -> bool [..., key_count]; a query of block k ends at (k+1)B."""
    return torch.arange(key_count, device=visible_end.device) < visible_end[..., None]


def train_visibility(document: torch.Tensor, block: torch.Tensor, slice_id: torch.Tensor) -> torch.Tensor:
    """Who sees whom in packed rows: three [..., N] integer tensors -> bool [..., N query, N key].

    ``document`` separates the trajectories of a row (-1 for padding), ``block`` is the grid index, and
    ``slice_id`` is -1 for clean tokens and otherwise distinct for every slice of a row.
    """
    same_document = document[..., :, None] == document[..., None, :]
    query_block, key_block = block[..., :, None], block[..., None, :]
    query_slice, key_slice = slice_id[..., :, None], slice_id[..., None, :]
    earlier = (key_block < query_block) | ((query_slice < 0) & (key_block == query_block))
    own_slice = (query_slice >= 0) & (query_slice == key_slice)
    return same_document & (((key_slice < 0) & earlier) | own_slice)
