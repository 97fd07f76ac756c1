"""From trajectories to training tensors: ragged slice packing and explicit token weights.

A trajectory of n slices becomes one sequence: a clean copy of everything before its last trained block, then
its n noisy blocks, each of which sees the clean blocks before its own and itself (`blocks.train_visibility`)::

    [ clean prompt and answer | block 2, step 1 | block 2, step 2 | block 3, step 1 | ... ]

That is exactly the published scheme of one dense row per slice round (TraceRL, arXiv 2509.06949; algorithm
reference 2.5), at a fraction of its tokens: blocks that are already finished are not repeated. Sequences share
rows (first fit, longest first), rows share micro-batches. A sequence longer than a micro-batch is cut into pieces
of neighbouring slices, each behind the clean tokens that it sees, so that memory does not grow with its length.

**Weights before packing.** Every normaliser is a weight per target token, computed over all samples of an
optimizer step before they are cut up. The loss is the plain sum of weight x term, so packing, micro-batches
and ranks cannot change it (invariant 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from learner.masking import mask_slices
from tstar_ray.blocks import Slices, build_slices
from tstar_ray.trajectory import Trajectory

Normaliser = Literal["token_mean", "const_len", "per_step_mean", "seq_mean", "paper_sum"]
Trace = Literal["trace", "random", "coupled"]


@dataclass(frozen=True, slots=True, eq=False)
class SlicedSample:
    """One trajectory laid out for training; N tokens, M targets in step order."""

    ids: NDArray[np.int64]
    """[N] clean tokens, then the noisy blocks."""
    position: NDArray[np.int64]
    """[N] absolute positions; noisy blocks repeat those of their clean copies."""
    block: NDArray[np.int64]
    """[N] grid index."""
    slice_id: NDArray[np.int64]
    """[N] -1 for clean tokens, else 0 … n-1."""
    target_index: NDArray[np.int64]
    """[M] where in the N tokens each target stands."""
    target_id: NDArray[np.int64]
    """[M] the token revealed there."""
    target_slice: NDArray[np.int64]
    """[M] its slice."""
    target_offset: NDArray[np.int64]
    """[M] its index in the completion, 0 … C-1; each occurs exactly once (invariant 2)."""
    recorded: NDArray[np.float32]
    """[M] its log-prob as the engine recorded it."""
    advantage: NDArray[np.float32]
    """[M] what it is credited with."""
    label: str = ""
    """Which trajectory this is, for people."""


def slice_sample(
    trajectory: Trajectory,
    advantage: float,
    *,
    block_size: int,
    mask_id: int,
    shrink: int,
    trace: Trace = "trace",
    rng: np.random.Generator | None = None,
) -> SlicedSample:
    """Lay out one trajectory at the training block size; ``trace`` other than its own needs ``rng``."""
    prompt = trajectory.prompt_len
    if trace == "trace":
        slices = build_slices(
            token_ids=trajectory.token_ids,
            step_map=trajectory.step_map,
            prompt_len=prompt,
            completion_len=trajectory.completion_len,
            block_size=block_size,
            mask_id=mask_id,
            shrink=shrink,
        )
    else:
        assert rng is not None, "random masks need a generator"
        slices = mask_slices(trajectory, block_size=block_size, mask_id=mask_id, kind=trace, rng=rng)
    return lay_out(
        slices,
        trajectory.token_ids,
        prompt_len=prompt,
        recorded=trajectory.logprobs,
        advantage=advantage,
        label=f"sample {trajectory.sample} of group {trajectory.group_id}",
    )


def lay_out(
    slices: Slices,
    token_ids: NDArray[np.integer],
    *,
    prompt_len: int,
    recorded: NDArray[np.float32] | None = None,
    advantage: float = 0.0,
    label: str = "",
) -> SlicedSample:
    """Slices (at least one) behind one clean copy of ``token_ids`` [T]; ``recorded`` [T - prompt_len], else zeros."""
    count, block_size = slices.noisy.shape
    clean = int(slices.block[-1]) * block_size  # the last block is never context of a slice
    noisy_position = slices.block[:, None] * block_size + np.arange(block_size)
    position = np.concatenate([np.arange(clean), noisy_position.ravel()])
    target_slice, in_block = np.nonzero(slices.target)
    offset = noisy_position[target_slice, in_block] - prompt_len
    return SlicedSample(
        ids=np.concatenate([token_ids[:clean].astype(np.int64), slices.noisy.ravel()]),
        position=position,
        block=position // block_size,
        slice_id=np.concatenate([np.full(clean, -1), np.repeat(np.arange(count), block_size)]),
        target_index=clean + target_slice * block_size + in_block,
        target_id=token_ids[prompt_len + offset].astype(np.int64),
        target_slice=target_slice,
        target_offset=offset,
        recorded=np.zeros(len(offset), dtype=np.float32) if recorded is None else recorded[offset],
        advantage=np.full(len(offset), advantage, dtype=np.float32),
        label=label,
    )


def token_weights(
    samples: Sequence[SlicedSample], normaliser: Normaliser, *, length_norm: int
) -> list[NDArray[np.float32]]:
    """[M] weights for each sample such that the loss is the sum of weight x term. n samples, S slices each:

    ``token_mean`` 1 / all targets; ``seq_mean`` 1 / (n M); ``const_len`` 1 / (n length_norm) (TraceRL's code);
    ``per_step_mean`` 1 / (n S |slice|); ``paper_sum`` 1 / (n |slice|), summed over slices (TraceRL eq. 3).
    """
    n = len(samples)
    total = sum(len(s.target_id) for s in samples)
    weights = []
    for sample in samples:
        m = len(sample.target_id)
        if normaliser == "token_mean":
            weight = np.full(m, 1 / total)
        elif normaliser == "seq_mean":
            weight = np.full(m, 1 / (n * m))
        elif normaliser == "const_len":
            weight = np.full(m, 1 / (n * length_norm))
        else:
            size = np.bincount(sample.target_slice)
            slices = len(size) if normaliser == "per_step_mean" else 1
            weight = 1 / (n * slices * size[sample.target_slice])
        weights.append(weight.astype(np.float32))
    return weights


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward and backward pass takes: R rows of N tokens, M targets."""

    ids: torch.Tensor
    """[R, N]."""
    positions: torch.Tensor
    """[R, N]."""
    document: torch.Tensor
    """[R, N] which sequence of the row; -1 is padding."""
    block: torch.Tensor
    """[R, N] grid index."""
    slice_id: torch.Tensor
    """[R, N] -1 for clean tokens."""
    index: torch.Tensor
    """[M] targets as flat indices into R * N."""
    targets: torch.Tensor
    """[M] token ids."""
    advantage: torch.Tensor
    """[M]."""
    weight: torch.Tensor
    """[M] see `token_weights`."""
    recorded: torch.Tensor
    """[M] log-probs the engine recorded."""
    sample: torch.Tensor
    """[M] index of the sample in the list that was packed."""
    step: torch.Tensor
    """[M] slice of the sample, 0 … S-1 in the order of denoising."""

    @property
    def tokens(self) -> int:
        """Tokens forwarded, padding left out."""
        return int((self.document >= 0).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def pack(
    samples: Sequence[SlicedSample],
    weights: Sequence[NDArray[np.float32]],
    *,
    row_tokens: int,
    micro_batch_tokens: int,
    width_multiple: int = 1,
) -> list[MicroBatch]:
    """Put samples into rows of at most ``row_tokens`` (longer ones alone) and rows into micro-batches of at most
    ``micro_batch_tokens`` tokens, padding included; samples beyond that are cut (see `cut`). Rows are as wide as
    their longest, rounded up to ``width_multiple`` so that compiled kernels see few shapes."""
    pieces = [(i, *piece) for i in range(len(samples)) for piece in cut(samples[i], weights[i], micro_batch_tokens)]
    owners, samples, weights = [list(column) for column in zip(*pieces)] if pieces else ([], [], [])
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = len(samples[i].ids)
        fit = next((r for r, free in enumerate(room) if free >= size), None)
        if fit is None:
            rows.append([i])
            room.append(min(row_tokens, micro_batch_tokens) - size)
        else:
            rows[fit].append(i)
            room[fit] -= size
    lengths = [-(-sum(len(samples[i].ids) for i in row) // width_multiple) * width_multiple for row in rows]
    batches: list[MicroBatch] = []
    pending: list[list[int]] = []
    longest = 0
    for r in sorted(range(len(rows)), key=lambda r: -lengths[r]):
        if pending and (len(pending) + 1) * longest > micro_batch_tokens:
            batches.append(_stack(samples, weights, owners, pending, longest))
            pending, longest = [], 0
        pending.append(rows[r])
        longest = max(longest, lengths[r])
    if pending:
        batches.append(_stack(samples, weights, owners, pending, longest))
    return batches


def cut(
    sample: SlicedSample, weight: NDArray[np.float32], limit: int
) -> list[tuple[SlicedSample, NDArray[np.float32]]]:
    """A sample and its weights in pieces of at most ``limit`` tokens.

    A piece has a clean copy of everything before its last block, and may hold as many noisy tokens as clean ones
    whatever the limit, so that cutting at most about doubles the tokens.
    """
    noisy = sample.slice_id >= 0
    count = int(sample.slice_id.max()) + 1
    if len(sample.ids) <= limit:
        return [(sample, weight)]
    block_size = int(noisy.sum()) // count
    first = np.flatnonzero(noisy)[::block_size]
    clean = sample.block[first] * block_size  # what each slice sees of earlier blocks
    pieces, start = [], 0
    while start < count:
        size = clean[start:] + block_size * np.arange(1, count - start + 1)
        too_long = np.flatnonzero(size > np.maximum(limit, 2 * clean[start:]))
        end = start + max(1, int(too_long[0])) if len(too_long) else count
        prefix = int(clean[end - 1])
        tokens = np.concatenate([np.arange(prefix), np.arange(first[start], first[start] + (end - start) * block_size)])
        kept = (sample.target_slice >= start) & (sample.target_slice < end)
        piece = replace(
            sample,
            ids=sample.ids[tokens],
            position=sample.position[tokens],
            block=sample.block[tokens],
            slice_id=np.where(sample.slice_id[tokens] < 0, -1, sample.slice_id[tokens] - start),
            target_index=sample.target_index[kept] - first[start] + prefix,
            target_id=sample.target_id[kept],
            target_slice=sample.target_slice[kept],
            target_offset=sample.target_offset[kept],
            recorded=sample.recorded[kept],
            advantage=sample.advantage[kept],
        )
        pieces.append((piece, weight[kept]))
        start = end
    return pieces


def _stack(
    samples: Sequence[SlicedSample],
    weights: Sequence[NDArray[np.float32]],
    owners: Sequence[int],
    rows: list[list[int]],
    width: int,
) -> MicroBatch:
    shape = (len(rows), width)
    tokens = {name: np.zeros(shape, dtype=np.int64) for name in ("ids", "position", "block")}
    document = np.full(shape, -1, dtype=np.int64)
    slice_id = np.full(shape, -1, dtype=np.int64)
    columns: dict[str, list[NDArray]] = {
        name: [] for name in ("index", "targets", "advantage", "weight", "recorded", "sample", "step")
    }
    for r, row in enumerate(rows):
        start = slices = 0
        for d, i in enumerate(row):
            s = samples[i]
            span = (r, slice(start, start + len(s.ids)))
            for name, filled in tokens.items():
                filled[span] = getattr(s, name)
            document[span] = d
            slice_id[span] = np.where(s.slice_id < 0, -1, s.slice_id + slices)
            columns["index"].append(r * width + start + s.target_index)
            columns["targets"].append(s.target_id)
            columns["advantage"].append(s.advantage)
            columns["weight"].append(weights[i])
            columns["recorded"].append(s.recorded)
            columns["sample"].append(np.full(len(s.target_id), owners[i]))
            columns["step"].append(s.target_slice)
            start += len(s.ids)
            slices += int(s.slice_id.max()) + 1
    return MicroBatch(
        ids=torch.from_numpy(tokens["ids"]),
        positions=torch.from_numpy(tokens["position"]),
        document=torch.from_numpy(document),
        block=torch.from_numpy(tokens["block"]),
        slice_id=torch.from_numpy(slice_id),
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()},
    )


def balance(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank so that the summed costs are even (largest first, to the lightest rank)."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += costs[i]
    return shares
