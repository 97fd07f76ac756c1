"""Keys and values of the sequences being decoded, and attention over them for ragged passes.

**One formula for every pass.** Keys and values are stored at their absolute position, also those of a block that
is still noisy, and each pass overwrites them. A query of block k sees all positions below (k+1)B, so prefill,
denoising and commit need no different masks, and block sizes may differ from row to row.

**Ragged passes.** The tokens of all rows stand end to end, so that projections and MLP spend nothing on padding;
only attention pads, within runs of neighbouring slots. A run is a plain slice of the cache, so nothing is gathered.

**Bounded memory.** A run ends where padding would more than double it, and has `SCORES_AT_ONCE` scores for each key
head at most; a long prompt's queries are cut for that. So besides the tokens of a pass nothing grows with the batch,
with the longest prompt beside short ones, or with the cache.

**Shared prompts.** A row may take the keys and values of its first tokens from another slot, also from one that
computes them in the very same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedConfig

from actors import kernels
from actors.denoise import send_together
from tstar_ray.blocks import decode_visibility

IntArray = NDArray[np.int64]

SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}
"""Scores of one run for each key head, by device type; also what the biases of a pass may hold for all its layers."""
_RUN_COST = {"cpu": 2**15, "cuda": 2**22}
"""Scores, for each head, that take about as long as the launches of a run of its own."""
_ALIGNED = 16
"""Keys are looked at in multiples of it: CUDA's kernels copy a bias that is not aligned, in every layer."""


def rounded_up(size: int, least: int = 16) -> int:
    """One of about eight sizes between a power of two and the next, ``least`` apart at least."""
    step = max(least, 2 ** (size.bit_length() - 4))
    return -(-size // step) * step


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
    def shape(self) -> tuple[int, int]:
        """S and T."""
        return self.keys[0].shape[0], self.keys[0].shape[2]

    @property
    def bytes_per_position(self) -> int:
        """Memory that one token of one sequence takes in all layers."""
        return 2 * self._layers * self._heads * self._dim * self._dtype.itemsize

    def resize(self, slots: int, length: int, *, kept: int) -> None:
        """Make room for ``slots`` x ``length``; the first ``kept`` slots keep what they hold.

        Holds nothing at all, 0 x 0, after a failure, which is a RuntimeError where memory runs out.
        """
        try:
            for tensors in (self.keys, self.values):
                for layer in range(self._layers):
                    # Layer by layer, so that at most one layer is held twice.
                    new = self._empty(slots, length)
                    if kept:
                        old = tensors[layer]
                        shared = min(length, old.shape[2])
                        new[:kept, :, :shared] = old[:kept, :, :shared]
                    tensors[layer : layer + 1] = [new]
        except BaseException:
            for tensors in (self.keys, self.values):
                tensors[:] = [self._empty(0, 0) for _ in range(self._layers)]
            raise

    def _empty(self, slots: int, length: int) -> torch.Tensor:
        return torch.zeros((slots, self._heads, length, self._dim), dtype=self._dtype, device=self._device)

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

    @property
    def first(self) -> IntArray:
        """[n] index of each row's first token among those of the pass."""
        return self.lengths.cumsum() - self.lengths

    def tokens(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Row, index among the row's queries, position, and one past the last position it sees, of each token: [N]."""
        row = np.repeat(np.arange(len(self.start)), self.lengths)
        query = np.arange(len(row)) - self.first[row]
        position = self.start[row] + query
        return row, query, position, (position // self.block_size[row] + 1) * self.block_size[row]


def cut_runs(rows: Rows, *, at_once: int, run_cost: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a pass into runs: (first row, one past the last, first query, one past the last) of each, in order.

    A run has at most ``at_once`` padded queries times keys, in one row only part of the queries if need be. Rows join
    the run before them where padding does not more than double its size, but for ``run_cost``, and where both are
    either prompts or not: rows of more than two blocks are.
    """
    lengths, keys = rows.lengths.tolist(), rows.end.tolist()
    prompts = (rows.lengths > 2 * rows.block_size).tolist()
    first = longest = farthest = needed = 0
    for row, (length, key) in enumerate(zip([*lengths, 0], [*keys, 0])):
        size = (row + 1 - first) * max(longest, length) * max(farthest, key)
        fits = row < len(lengths) and size <= min(at_once, 2 * (needed + length * key) + run_cost)
        if row > first and not (fits and prompts[row] == prompts[first]):
            queries = longest if row > first + 1 else max(1, at_once // farthest)
            for begin in range(0, longest, queries):
                yield first, row, begin, min(begin + queries, longest)
            first, longest, farthest, needed = row, 0, 0, 0
        longest, farthest, needed = max(longest, length), max(farthest, key), needed + length * key


@dataclass(frozen=True, slots=True)
class FixedTensors:
    """Where the tokens of a pass of fixed shape are, on the device; N tokens of S rows of Q queries."""

    slot_N: torch.Tensor
    """[N] slot of each token."""
    position_N: torch.Tensor
    """[N] its position."""
    place: torch.Tensor | None
    """[N] flat index into [S, Q]; None where the tokens are all of these."""
    end: torch.Tensor
    """[S, Q] one past the last position that each query sees; 1 for those that no token is at."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring rows, or some queries of one row, whose attention is one padded call."""

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
    end: torch.Tensor
    """[rows, longest] one past the last position that each query sees."""


class CacheLayout:
    """Attention of one pass over the cache: a `tstar_ray.model.Layout`."""

    slot_N: torch.Tensor
    """[N] slot of each token."""
    position_N: torch.Tensor
    """[N] position of each token."""

    def __init__(self, cache: KVCache, groups: int) -> None:
        """``groups``: query heads that share one key head."""
        self._cache, self._groups = cache, groups
        self._copies: list[tuple[torch.Tensor, ...]] = []
        """Slots to copy from, slots to copy to and positions, a piece at a time."""
        self._runs: list[_Run] = []
        self._biases: list[torch.Tensor] | None = None
        """Of every run, where all of them may be kept for all layers."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`; R is 1."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self.slot_N, :, self.position_N] = key[0].transpose(0, 1)
        values[self.slot_N, :, self.position_N] = value[0].transpose(0, 1)
        for source, target, position in self._copies:
            keys[target, :, position] = keys[source, :, position]
            values[target, :, position] = values[source, :, position]
        flat_NHD = query[0].transpose(0, 1)
        parts = []
        for i, run in enumerate(self._runs):
            bias = self._bias(run) if self._biases is None else self._biases[i]
            parts.append(self._attend_run(run, bias, flat_NHD[run.tokens], keys, values, scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _bias(self, run: _Run) -> torch.Tensor:
        """[rows, 1, groups * longest, keys]."""
        keys = self._cache.keys[0]
        bias = torch.zeros(run.rows, run.longest, run.keys, dtype=keys.dtype, device=keys.device)
        bias.masked_fill_(~decode_visibility(run.keys, run.end), -torch.inf)
        return bias.repeat(1, self._groups, 1)[:, None]

    def _attend_run(
        self, run: _Run, bias: torch.Tensor, flat: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
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
            out = torch.softmax(scores.add_(bias), dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(padded, key, value, attn_mask=bias, scale=scale)
        out = out.view(n, kv_heads, g, q, dim).permute(0, 3, 1, 2, 4).reshape(n * q, kv_heads * g, dim)
        return out if run.place is None else out[run.place]


class RaggedLayout(CacheLayout):
    """A pass as it comes: as many runs as its rows need."""

    def __init__(self, cache: KVCache, rows: Rows, *, groups: int, also: Sequence[IntArray] = ()) -> None:
        """``also``: what else the pass needs on the device; it travels in the same transfer and is `also` then."""
        super().__init__(cache, groups)
        device = cache.keys[0].device
        lengths, first = rows.lengths, rows.first
        row, query, position, visible = rows.tokens()
        at_once = SCORES_AT_ONCE[device.type]
        runs, arrays = [], [np.stack([rows.slot[row], position]), _copies(rows), *also]
        cuts = cut_runs(rows, at_once=at_once // groups, run_cost=_RUN_COST[device.type] // groups)
        for a, b, begin, stop in cuts:
            longest = stop - begin
            tokens = slice(
                int(first[a]) + begin, int(first[a]) + stop if b == a + 1 else int(first[b - 1] + lengths[b - 1])
            )
            place = (row[tokens] - a) * longest + query[tokens] - begin
            # Padding queries see position 0, so that no softmax is empty; their output is never read.
            end = np.ones((b - a) * longest, dtype=np.int64)
            end[place] = visible[tokens]
            dense = len(place) == len(end)
            runs.append((a, b, tokens, longest, int(end.max()), dense))
            arrays += [end.reshape(b - a, longest), place[: 0 if dense else None]]
        (self.slot_N, self.position_N), copies, *sent = send_together(arrays, device)
        self.also = sent[: len(also)]
        pieces = copies.split(max(1, at_once // (cache.keys[0][:1, :, :1].numel())), dim=1)
        self._copies = [tuple(piece) for piece in pieces if piece.numel()]
        self._runs = [
            _Run(
                slots=slice(int(rows.slot[a]), int(rows.slot[b - 1]) + 1),
                tokens=tokens,
                rows=b - a,
                longest=longest,
                keys=min(-(-keys // _ALIGNED) * _ALIGNED, cache.shape[1]),
                small=device.type == "cpu" and lengths[a] <= 2 * rows.block_size[a],
                place=None if dense else place,
                end=end,
            )
            for (a, b, tokens, longest, keys, dense), end, place in zip(
                runs, sent[len(also) :: 2], sent[len(also) + 1 :: 2]
            )
        ]
        kept = sum(run.rows * run.longest * run.keys * groups for run in self._runs) <= at_once
        self._biases = [self._bias(run) for run in self._runs] if kept else None


class FixedLayout(CacheLayout):
    """A pass of the first slots, in one run whose shape and tensors are given: it may be recorded."""

    def __init__(self, cache: KVCache, at: FixedTensors, *, groups: int, keys: int, small: bool) -> None:
        """Attends to the first ``keys`` positions. ``small``: as in a pass of few queries."""
        super().__init__(cache, groups)
        self.slot_N, self.position_N = at.slot_N, at.position_N
        rows, longest = at.end.shape
        self._runs = [
            _Run(
                slots=slice(0, rows),
                tokens=slice(0, len(at.slot_N)),
                rows=rows,
                longest=longest,
                keys=keys,
                small=small,
                place=at.place,
                end=at.end,
            )
        ]
        self._biases = [self._bias(self._runs[0])]


class FusedLayout:
    """A pass of the first slots as `FixedLayout`'s, by actors.kernels: attention of each row reads what that row sees,
    holds no bias and pads nothing but queries."""

    def __init__(self, cache: KVCache, at: FixedTensors) -> None:
        self._cache, self._at = cache, at
        self._token: torch.Tensor | None = None
        if at.place is not None:
            # Tokens that fill a pass up share the place of its first, and are that one again: any of them will do.
            self._token = torch.full_like(at.end.view(-1), -1)
            self._token[at.place] = torch.arange(len(at.place), device=at.place.device)
            self._token = self._token.view_as(at.end)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`; R is 1."""
        keys, values, at = self._cache.keys[layer], self._cache.values[layer], self._at
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        kernels.store_(keys, values, key, value, at.slot_N, at.position_N)
        found = kernels.attend(query, keys, values, at.end, self._token, scale).flatten(0, 1)
        return (found if at.place is None else found.index_select(0, at.place))[None]


def _copies(rows: Rows) -> IntArray:
    """[3, C] slot to copy from, slot to copy to, position; of all positions that rows take from another slot."""
    follower = np.flatnonzero(rows.source >= 0)
    count = rows.start[follower]
    row = np.repeat(follower, count)
    position = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
    return np.stack([rows.source[row], rows.slot[row], position])
