"""NumPy in place of the eight Triton kernels that vLLM's runner launches in every step; for CPU only.

Triton has no CPU backend on PyPI. Its interpreter runs the kernels as they are, some fifteen times slower than these.
Installed with vLLM's own hook, ``register_kernels``; arguments and names are those of the kernels (vllm 0.32.0,
``vllm/v1/worker/gpu``).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _arrays(*tensors: Any) -> list[NDArray[Any]]:
    return [tensor.numpy() for tensor in tensors]


def _at(address: int, count: int) -> NDArray[np.int32]:
    """int32 values at an address, as kernels get pointers to block tables."""
    return np.ctypeslib.as_array((ctypes.c_int32 * int(count)).from_address(int(address)))


def prefill_inputs(ids, following, stride, ahead, slots, starts, tokens, width, lengths, computed, **_: Any) -> None:
    """Prompt tokens of the requests that read."""
    ids, following, slots, starts, tokens, lengths, computed = _arrays(
        ids, following, slots, starts, tokens, lengths, computed
    )
    for row, slot in enumerate(slots):
        done, length = int(computed[slot]), int(lengths[slot])
        if done >= length:
            continue
        end = done + int(starts[row + 1] - starts[row])
        ids[starts[row] : starts[row + 1]] = tokens[slot, done:end]
        for j in range(ahead):
            following[j, slot] = tokens[slot, end + j] if end + j < length else 0


def positions_and_lengths(positions, seq_lens, slots, starts, computed, most, **_: Any) -> None:
    """Where the queries stand, and how long each sequence is with them."""
    positions, seq_lens, slots, starts, computed = _arrays(positions, seq_lens, slots, starts, computed)
    for row, slot in enumerate(slots):
        count = int(starts[row + 1] - starts[row])
        seq_lens[row] = computed[slot] + count
        positions[starts[row] : starts[row + 1]] = np.arange(computed[slot], computed[slot] + count)
    seq_lens[len(slots) : most] = 0


def combine(
    ids, slots, last, starts, seq_lens, lengths, drafts, stride, logits, indices, NUM_NEW_SAMPLED_TOKENS=1, **_: Any
) -> None:
    """Canvases into the inputs, and which rows' hidden states the sampler gets."""
    ids, slots, last, starts, seq_lens, lengths, drafts, logits, indices = _arrays(
        ids, slots, last, starts, seq_lens, lengths, drafts, logits, indices
    )
    extra = NUM_NEW_SAMPLED_TOKENS
    for row, slot in enumerate(slots):
        count, end = int(logits[row + 1] - logits[row]), int(starts[row + 1])
        indices[logits[row] : logits[row + 1]] = np.arange(end - count, end)
        if seq_lens[row] <= lengths[slot]:
            continue
        if extra > 0 and seq_lens[row] - count >= lengths[slot]:
            ids[end - count] = last.reshape(len(last), -1)[slot, 0]
        if count > extra:
            ids[end - (count - extra) : end] = drafts[slot, : count - extra]


def post_update(
    slots, computed, last, bins, bins_stride, sampled, stride, emitted, rejected, starts, tokens, width, total, **_: Any
) -> None:
    """Move on by what was kept."""
    slots, computed, last, sampled, emitted, rejected, tokens, total = _arrays(
        slots, computed, last, sampled, emitted, rejected, tokens, total
    )
    queries = np.zeros(len(slots), dtype=np.int32) if starts is None else np.diff(starts.numpy()[: len(slots) + 1])
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        count = int(emitted[row])
        if count:
            last[slot] = sampled[row, count - 1]
            tokens[slot, total[slot] : total[slot] + count] = sampled[row, :count]
            if bins is not None:
                np.add.at(bins.numpy()[slot], sampled[row, :count], 1)
            total[slot] += count
        computed[slot] += queries[row] - int(rejected[row])


def expand(slots, out, local, logits, **_: Any) -> None:
    """A slot and an offset for every row of logits."""
    slots, out, local, logits = _arrays(slots, out, local, logits)
    for row, slot in enumerate(slots):
        out[logits[row] : logits[row + 1]] = slot
        local[logits[row] : logits[row + 1]] = np.arange(logits[row + 1] - logits[row])


def apply_write(out, stride, rows, starts, values, ends, groups, MULTI_GROUP, **_: Any) -> None:
    """Values that were staged on the host."""
    rows, starts, values, ends = _arrays(rows, starts, values, ends)
    begin = 0
    for k in range(len(groups) if MULTI_GROUP else len(rows)):
        end = int(ends[k])
        if MULTI_GROUP:
            group = int(groups[k])
            offset = int(rows[k]) * int(stride[group]) + int(starts[k])
            target = _at(int(out[group]) + 4 * offset, end - begin)
        else:
            line = out.numpy()[int(rows[k])] if out.ndim > 1 else out.numpy()[int(rows[k]) :]
            target = line[int(starts[k]) : int(starts[k]) + end - begin]
        target[:] = values[begin:end]
        begin = end


def gather_block_tables(slots, sources, targets, strides, counts, counts_stride, requests, **_: Any) -> None:
    """Block tables in batch order."""
    slots, counts = _arrays(slots, counts)
    for group in range(sources.shape[0]):
        stride = int(strides[group])
        for row, slot in enumerate(slots):
            count = int(counts[group, slot])
            source = _at(int(sources[group]) + 4 * int(slot) * stride, count)
            _at(int(targets[group]) + 4 * row * stride, count)[:] = source


def slot_mappings(
    most, slots, starts, positions, tables, strides, sizes, enabled, dcp, out, out_stride, rank, **constants: int
) -> None:
    """Where in the cache each query's key and value go."""
    padding = constants["PAD_ID"]
    slots, starts, positions, out = _arrays(slots, starts, positions, out)
    for group in range(tables.shape[0]):
        stride, size = int(strides[group]), int(sizes[group])
        for row, slot in enumerate(slots):
            at = positions[starts[row] : starts[row + 1]]
            if slot < 0 or not bool(enabled[group]) or not len(at):
                out[group, starts[row] : starts[row + 1]] = padding
                continue
            table = _at(int(tables[group]) + 4 * int(slot) * stride, stride)
            out[group, starts[row] : starts[row + 1]] = table[at // size].astype(np.int64) * size + at % size
        out[group, starts[len(slots)] : most] = padding


@functools.cache
def install() -> None:
    """Register all of them with vLLM, once in a process."""
    from vllm.triton_utils.dispatcher import register_kernels

    gpu = "vllm.v1.worker.gpu."
    register_kernels(
        {
            gpu + "input_batch._prepare_prefill_inputs_kernel": prefill_inputs,
            gpu + "input_batch._prepare_pos_seq_lens_kernel": positions_and_lengths,
            gpu + "input_batch._combine_sampled_and_draft_tokens_kernel": combine,
            gpu + "input_batch._post_update_kernel": post_update,
            gpu + "input_batch._expand_idx_mapping_kernel": expand,
            gpu + "buffer_utils._apply_write_kernel": apply_write,
            gpu + "block_table._gather_block_tables_kernel": gather_block_tables,
            gpu + "block_table._compute_slot_mappings_kernel": slot_mappings,
        }
    )
