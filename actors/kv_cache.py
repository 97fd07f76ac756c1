"""Keys and values of the sequences being decoded, and attention over them for ragged passes.

**One formula for every pass.** Keys and values are stored at their absolute position, also those of a block that
is still noisy, and each pass overwrites them. A query of block k sees all positions below (k+1)B, so prefill,
denoising and commit need no different masks, and block sizes may differ from row to row.

**Ragged passes.** The tokens of all rows stand end to end, so that projections and MLP spend nothing on padding;
only attention pads, within runs of neighbouring slots: those with few queries (denoising) apart from those with
many (prompts). A run is a plain slice of the cache, so nothing is gathered.

**Shared prompts.** A row may take the keys and values of its first tokens from another slot, also from one that
computes them in the very same pass.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedConfig

from tstar_ray.blocks import decode_visibility

IntArray = NDArray[np.int64]


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class KVCache:
    """S slots of T positions in every layer; nothing is held before the first `resize`."""

    def __init__(self, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        """``config`` of the model whose keys and values it holds."""
        self._heads, self._dim = config.num_key_value_heads, head_dim(config)
        self._layers = config.num_hidden_layers
        self._dtype, self._device = dtype, device
        self.keys: list[torch.Tensor] = []
        """[S, Hkv, T, D] of each layer."""
        self.values: list[torch.Tensor] = []
        """The same shape."""
        self.resize(0, 0, kept=0)

    @property
    def bytes_per_position(self) -> int:
        """Memory that one token of one sequence takes in all layers."""
        return 2 * self._layers * self._heads * self._dim * self._dtype.itemsize

    def resize(self, slots: int, length: int, *, kept: int) -> None:
        """Make room for ``slots`` x ``length``; the first ``kept`` slots keep what they hold."""
        for tensors in (self.keys, self.values):
            for layer in range(self._layers):
                # Layer by layer, so that at most one layer is held twice.
                shape = (slots, self._heads, length, self._dim)
                new = torch.zeros(shape, dtype=self._dtype, device=self._device)
                if kept:
                    old = tensors[layer]
                    shared = min(length, old.shape[2])
                    new[:kept, :, :shared] = old[:kept, :, :shared]
                tensors[layer : layer + 1] = [new]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole slots; both [k] on the cache's device."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]


@dataclass(frozen=True, slots=True)
class Rows:
    """What one pass computes: for each of n rows, positions ``start`` to ``end`` of one slot. All [n], on the host.

    Slots are neighbours in ascending order.
    """

    slot: IntArray
    """Slot of the cache."""
    start: IntArray
    """First position computed."""
    end: IntArray
    """One past the last; a grid line of the row's block size."""
    block_size: IntArray
    """B."""
    source: IntArray
    """Slot whose first ``start`` positions are copied before this row attends, or -1."""

    @property
    def lengths(self) -> IntArray:
        """[n] queries of each row."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring rows whose attention is one padded call."""

    slots: slice
    tokens: slice
    """Of the pass's tokens."""
    rows: int
    longest: int
    """Queries to pad to."""
    keys: int
    """Positions looked at."""
    small: bool
    """Few queries, on CPU: two plain matrix products are twice as fast there as the fused kernel."""
    place: torch.Tensor | None
    """[tokens] flat index into [rows, longest]; None where nothing is padded."""
    bias: torch.Tensor
    """[rows, 1, groups * longest, keys]."""


class RaggedLayout:
    """One pass over the cache: a `tstar_ray.model.Layout`."""

    def __init__(self, cache: KVCache, rows: Rows, *, groups: int) -> None:
        """``groups``: query heads that share one key head."""
        self._cache, self._groups = cache, groups
        keys = cache.keys[0]
        lengths = rows.lengths
        first = lengths.cumsum() - lengths
        row = np.repeat(np.arange(len(lengths)), lengths)
        query = np.arange(len(row)) - first[row]
        position = rows.start[row] + query
        visible = (position // rows.block_size[row] + 1) * rows.block_size[row]
        self.slot_N, self.position_N = torch.from_numpy(np.stack([rows.slot[row], position])).to(keys.device)
        follower = np.flatnonzero(rows.source >= 0)
        self._copies = [(int(rows.source[i]), int(rows.slot[i]), int(rows.start[i])) for i in follower]
        # Rows far longer than two blocks are prompts; neighbours of one kind are padded together.
        long = lengths > 2 * rows.block_size
        edges = [0, *(np.flatnonzero(np.diff(long)) + 1).tolist(), len(long)]
        self._runs = []
        for a, b in itertools.pairwise(edges):
            tokens = slice(int(first[a]), int(first[b - 1] + lengths[b - 1]))
            longest, key_count = int(lengths[a:b].max()), int(rows.end[a:b].max())
            place = (row[tokens] - a) * longest + query[tokens]
            # Padding queries see position 0, so that no softmax is empty; their output is never read.
            end = np.ones((b - a) * longest, dtype=np.int64)
            end[place] = visible[tokens]
            end_RQ = torch.from_numpy(end.reshape(b - a, longest)).to(keys.device)
            bias = torch.zeros(b - a, longest, key_count, dtype=keys.dtype, device=keys.device)
            bias.masked_fill_(~decode_visibility(key_count, end_RQ), -torch.inf)
            dense = len(place) == len(end)
            self._runs.append(
                _Run(
                    slots=slice(int(rows.slot[a]), int(rows.slot[b - 1]) + 1),
                    tokens=tokens,
                    rows=b - a,
                    longest=longest,
                    keys=key_count,
                    small=keys.device.type == "cpu" and not long[a],
                    place=None if dense else torch.from_numpy(place).to(keys.device),
                    bias=bias.repeat(1, groups, 1)[:, None],
                )
            )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`; R is 1."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self.slot_N, :, self.position_N] = key[0].transpose(0, 1)
        values[self.slot_N, :, self.position_N] = value[0].transpose(0, 1)
        for source, target, length in self._copies:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        flat_NHD = query[0].transpose(0, 1)
        parts = [self._attend_run(run, flat_NHD[run.tokens], keys, values, scale) for run in self._runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _attend_run(
        self, run: _Run, flat: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[tokens, H, D] -> the same shape. Query heads that share a key head become more queries."""
        n, q, g = run.rows, run.longest, self._groups
        kv_heads, dim = keys.shape[1], keys.shape[3]
        padded = flat
        if run.place is not None:
            padded = flat.new_zeros(n * q, *flat.shape[1:])
            padded[run.place] = flat
        padded = padded.reshape(n, q, kv_heads, g, dim).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, g * q, dim)
        key, value = keys[run.slots, :, : run.keys], values[run.slots, :, : run.keys]
        if run.small:
            scores = (padded * scale) @ key.transpose(-1, -2)
            out = torch.softmax(scores.add_(run.bias), dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(padded, key, value, attn_mask=run.bias, scale=scale)
        out = out.view(n, kv_heads, g, q, dim).permute(0, 3, 1, 2, 4).reshape(n * q, kv_heads * g, dim)
        return out if run.place is None else out[run.place]
