"""Denoising passes of a few fixed shapes, recorded as CUDA graphs.

A pass launches some fifty kernels for each layer. With few tokens a GPU computes them faster than the host launches
them; a graph launches all of them at once. It demands that shapes and addresses are those of the recording:

    rows of the pass ──round up──► shape ──► recorded? ──► one transfer into its plan ──► replay ──► hidden states

- **Shapes are rounded up**: rows, queries of a row, tokens and keys. What fills the tokens up is the pass's first token
  again: it writes the same keys and values to the same place, so that nothing is masked and no place is set aside.
  What fills the rows up are queries of slots whose result nobody reads.
- **Where all rows have as many queries**, as in a static schedule, they are all the tokens, and nothing is padded in
  attention. What fills the rows up then are the first tokens of slots that nobody uses.
- **What differs from pass to pass** is one tensor of integers: slot and position of each token, and how far each query
  sees. Token ids are read inside the graph.
- **Weights, cache and slots stay where they are**; new weights are copied into the old. Whoever moves the cache or the
  slots calls `GraphedPasses.clear`.
- A shape is recorded when it comes for the third time; where memory runs out meanwhile, its passes are run without.
  Passes that read prompts or copy their keys are not recorded, since they are of many shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from actors.decoder import Decoder
from actors.denoise import to_device
from actors.kv_cache import (
    SCORES_AT_ONCE,
    FixedLayout,
    FixedTensors,
    FusedLayout,
    IntArray,
    KVCache,
    Rows,
    rounded_up,
)
from actors.slots import Slots
from tstar_ray.model import Layout

RECORDED_AT_MOST = 128
"""Shapes; the one that was not needed for the longest time makes room."""
_WORTH_IT = 3
"""Passes of a shape until it is recorded, which takes longer than a pass: some shapes do not come back."""
_STEP = 64
"""Tokens and keys are multiples of it at least."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a recorded pass."""

    rows: int
    """Slots."""
    queries: int
    """Of a row, padded."""
    tokens: int
    """Of the pass."""
    keys: int
    """Positions looked at; 0 where each row looks at its own."""
    even: bool
    """Tokens are those of all rows, which have as many queries each."""


class GraphedPasses:
    """Runs passes of recorded shapes."""

    def __init__(self, decoder: Decoder, cache: KVCache, slots: Slots) -> None:
        self._decoder, self._cache, self._slots = decoder, cache, slots
        self._device = slots.ids.device
        self._passes: OrderedDict[Shape, _Pass] = OrderedDict()
        self._seen: dict[Shape, int] = {}
        self._recorder = _Recorder() if self._device.type == "cuda" else None

    @property
    def shapes(self) -> list[Shape]:
        """Recorded now."""
        return list(self._passes)

    def clear(self) -> None:
        """Forget all recordings, before the cache or the slots move."""
        self._passes.clear()
        self._seen.clear()

    def find(self, rows: Rows) -> Callable[[Rows], torch.Tensor] | None:
        """What runs a pass like this one, which begins at slot 0: it returns final hidden states [tokens, H], those of
        the pass's own tokens first, which the next pass overwrites. None where its shape is not recorded."""
        shape = self.shape(rows)
        if shape is None:
            return None
        if shape in self._passes:
            self._passes.move_to_end(shape)
            return self._passes[shape]
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] < _WORTH_IT:
            return None
        if len(self._passes) == RECORDED_AT_MOST:
            self._passes.popitem(last=False)
        if self._recorder and not any(made.recorded for made in self._passes.values()):
            self._recorder.renew()
        made = _Pass(shape, self._run, self._device, self._recorder)
        return self._passes.setdefault(shape, made)

    def shape(self, rows: Rows) -> Shape | None:
        """The fixed shape that a pass fits into; None for passes that read prompts or copy keys, or are too large."""
        lengths = rows.lengths
        if (rows.source >= 0).any() or (lengths > 2 * rows.block_size).any():
            return None
        slots, positions = self._cache.shape
        count, queries, even = min(rounded_up(len(lengths), least=8), slots), int(lengths.max()), np.ptp(lengths) == 0
        shape = Shape(
            rows=count,
            queries=queries,
            tokens=count * queries if even else rounded_up(int(lengths.sum()), least=_STEP),
            keys=0 if self._decoder.fused else min(rounded_up(int(rows.end.max()), least=_STEP), positions),
            even=bool(even),
        )
        scores = shape.rows * shape.queries * shape.keys * self._decoder.groups
        return shape if scores <= SCORES_AT_ONCE[self._device.type] else None

    def _run(self, shape: Shape, at: FixedTensors) -> torch.Tensor:
        """Final hidden states [tokens, H]."""
        layout: Layout
        if self._decoder.fused:
            layout = FusedLayout(self._cache, at)
        else:
            small = self._device.type == "cpu"
            layout = FixedLayout(self._cache, at, groups=self._decoder.groups, keys=shape.keys, small=small)
        ids = self._slots.ids[at.slot_N, at.position_N]
        return self._decoder.hidden(ids, at.position_N, layout)


class _Recorder:
    """Records on a stream of its own, into memory that all recordings share."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.renew()

    def renew(self) -> None:
        """Take other memory: of that which no recording uses any more, PyTorch gives nothing to new ones."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
        """A graph of ``run`` and the tensor that it fills; None where memory ran out. ``run`` may be run more than
        once."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):  # libraries take their workspaces outside of the recording
                run()
            # What other threads of the actor do to the device is none of the recording's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                filled = run()
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph, filled


class _Pass:
    """One shape."""

    def __init__(
        self,
        shape: Shape,
        run: Callable[[Shape, FixedTensors], torch.Tensor],
        device: torch.device,
        recorder: _Recorder | None,
    ) -> None:
        """What ``recorder`` does not record, as there is none on CPU, is run as it is."""
        self._shape, self._recorder = shape, recorder
        n, padded = shape.tokens, shape.rows * shape.queries
        self._plan = torch.empty(3 * n + padded, dtype=torch.long, device=device)
        slot, position, place, end = self._plan.split([n, n, n, padded])
        end = end.view(shape.rows, shape.queries)
        self._run = partial(run, shape, FixedTensors(slot, position, None if shape.even else place, end))
        self._recorded: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None

    @property
    def recorded(self) -> bool:
        """Whether it is replayed."""
        return self._recorded is not None

    def __call__(self, rows: Rows) -> torch.Tensor:
        """See `GraphedPasses.find`."""
        self._plan.copy_(to_device(plan(rows, self._shape), self._plan.device))
        if self._recorder:
            # Once: with the plan of this pass, which does no harm to run again.
            self._recorded, self._recorder = self._recorder.record(self._run), None
        if self._recorded is None:
            return self._run()
        graph, hidden = self._recorded
        graph.replay()
        return hidden


def plan(rows: Rows, shape: Shape) -> IntArray:
    """Slot, position and place of ``shape.tokens`` tokens, then one past the last position of all padded queries."""
    row, query, position, visible = rows.tokens()
    place = row * shape.queries + query
    end = np.ones(shape.rows * shape.queries, dtype=np.int64)
    end[place] = visible
    tokens = np.stack([rows.slot[row], position, place])
    if shape.even:
        others = np.arange(tokens.shape[1], shape.tokens)
        filling = np.stack([others // shape.queries, others % shape.queries, others])
    else:
        filling = np.repeat(tokens[:, :1], shape.tokens - tokens.shape[1], axis=1)
    return np.concatenate([np.concatenate([tokens, filling], axis=1).ravel(), end])
