"""Block-diffusion decoding in plain PyTorch with continuous batching: the default engine.

One loop; each round is one forward pass for all sequences together, whatever their step, block and block size::

    waiting ──admit──► slots ──► [ forward ──► draw ──► reveal ──► block done? ──► ended? ]* ──► trajectory
               ▲                                                                    │
               └───────────────────────────── a free slot ──────────────────────────┘

**One pass does everything that is due.** A sequence's queries are the positions from the first one whose keys and
values are not final to the end of its current block: B of them, 2B right after a block was finished (the clean
block is committed in the same pass that denoises the next one), the whole prompt and the first block for a new
sequence. The result is that of separate passes (algorithm reference 5.1). Samples of one prompt read it once. Only
what exceeds ``pass_tokens`` gets passes of its own.

**Nothing can get stuck.** A sequence is admitted, in the order of submission, when a slot of its full length is
free, so that an admitted one never waits for memory. Slots get longer when a longer request comes, by steps of about an
eighth, so that requests of many lengths do not move the cache each time.

**The device is asked once a round**: one small tensor says which masked positions were revealed and which hold
stop tokens; a round in which sequences end fetches these as well. All else is planned on the host (actors.slots), and
goes to the device in one transfer that nothing waits for, however many decoding settings are in use.

**Shapes may be fixed** (``cuda_graphs``): passes that only denoise and commit are then recorded as CUDA graphs and
replayed (actors.graphs). So that most passes do no more than that, a sixteenth of the slots are given away together.

**New weights** are loaded between two rounds. Keys and values of older weights are computed again in the next pass
(``recompute``), so that every recorded log-prob is that of one version's weights, or stay (``keep``) and the
trajectory is marked ``stale_cache``.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actors.decoder import Decoder
from actors.denoise import Positions, denoise, send_together, to_device
from actors.engine import UNPROVEN, EngineStats
from actors.graphs import GraphedPasses
from actors.kv_cache import IntArray, KVCache, RaggedLayout, Rows, rounded_up
from actors.rounds import Rounds
from actors.slots import Slots, Work
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof, checksum_parts, load_flat

CacheUpdate = Literal["recompute", "keep"]
_TOGETHER = 16
"""With graphs, one of so many slots must be free before sequences that wait are admitted: at three per cent fewer
sequences in a pass, new prompts are read in one pass of several instead of in all."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A denoising step of S sequences that share decoding settings, as it is planned on the host."""

    rule: int
    """Index of the settings."""
    masked: NDArray[np.bool_]
    """[S, B]."""
    places: IntArray
    """[2, M] slot and offset in its block of each masked position."""
    arrays: tuple[IntArray, IntArray]
    """For the device: [6, M] row of the hidden states, seed, position, step, index into the slots' tensors, index into
    [S, B]; and [S] steps that the blocks have taken."""


class TorchEngine(Rounds):
    """An `actors.engine.Engine` on one device."""

    def __init__(
        self,
        model: BlockDiffusionLM,
        *,
        max_batch: int = 128,
        cache_gb: float = 4.0,
        cache_update: CacheUpdate = "recompute",
        pass_tokens: int = 8192,
        cuda_graphs: bool = False,
        triton_kernels: bool = False,
        version: int = 0,
    ) -> None:
        """At most ``max_batch`` sequences at once, and as many as fit into ``cache_gb`` GiB of keys and values;
        prompts beyond ``pass_tokens`` in one pass are read in several, which bounds what its tokens take (what its
        attention takes is bounded in actors.kv_cache). ``cuda_graphs``: see actors.graphs; on CPU its passes are
        of the same fixed shapes, and nothing is recorded. ``triton_kernels``: see actors.kernels; of attention, that
        of the fixed shapes."""
        super().__init__()
        self._model, self._decoder = model.eval(), Decoder(model, fused=triton_kernels)
        self._max_batch, self._cache_gb = max_batch, cache_gb
        self._cache_update, self._pass_tokens = cache_update, pass_tokens
        self._proof = Proof(version, checksum_parts(model.parameters()))
        self._stats = EngineStats()
        self._cache = KVCache(model.hf.config, dtype=model.dtype, device=model.device)
        self._slots = Slots(mask_id=model.mask_id, device=model.device)
        self._graphs = GraphedPasses(self._decoder, self._cache, self._slots) if cuda_graphs else None
        self._positions = int(cache_gb * 2**30) // self._cache.bytes_per_position
        self._waiting: deque[Work] = deque()
        self._rules: list[Decoding] = []
        self._stops: list[torch.Tensor] = []
        """Stop ids of each rule, on the device."""
        self._full = False
        """Nothing that waits can be admitted before a slot is free."""
        self._filled = 0
        """Sequences that were active when the last one was admitted; 0 where nothing waited then."""
        self._broken = False

    @property
    def proof(self) -> Proof:
        """Version and checksum of the weights it serves."""
        return self._proof

    @property
    def stats(self) -> EngineStats:
        """Totals so far."""
        return dataclasses.replace(self._stats)

    @property
    def broken(self) -> bool:
        """See `actors.engine.Engine.broken`: after most errors of CUDA nothing works in its process any more."""
        return self._broken

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """See `actors.engine.Engine.load_weights`."""
        with self.paused():
            self._proof = UNPROVEN  # where copying fails half-way, nothing is proven
            load_flat(self._model, flat)
            self._proof = Proof(version, checksum_parts(self._model.parameters()))
            if self._cache_update == "recompute":
                self._slots.column("committed")[:] = 0
            else:
                self._slots.column("stale")[:] |= self._slots.column("committed") > 0
            return self._proof

    def sleep(self) -> None:
        """See `actors.engine.Engine.sleep`."""
        with self.paused():
            if self._waiting or self._slots.active:
                raise RuntimeError(f"{self._slots.active} sequences are being decoded, {len(self._waiting)} wait")
            self._resize(0, 0)
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _submit(self, requests: Sequence[Request], decoding: Decoding) -> list[int]:
        """Queue requests; they join the batch in the next rounds."""
        with self.paused():
            work = []
            for request in requests:
                self._check_prompt(request)
                own = decoding.varied(request.variant)
                if own not in self._rules:
                    self._rules.append(own)
                    self._stops.append(to_device(np.array(own.stop_ids, dtype=np.int64), self._model.device))
                work.append(Work(next(self._tickets), request, own, self._rules.index(own)))
            longest = max((item.limit for item in work), default=0)
            if longest > self._positions:
                size = self._cache.bytes_per_position
                raise ValueError(
                    f"one sequence of {longest} tokens needs {in_bytes(longest * size)} of cache, "
                    f"actors.cache_gb={self._cache_gb:g} allows {in_bytes(self._positions * size)}; "
                    "raise it or lower max_new_tokens"
                )
            self._waiting.extend(work)
            return [item.ticket for item in work]

    def _check_prompt(self, request: Request) -> None:
        vocabulary, ids = len(self._model.suppressed_V), np.array(request.prompt_ids, dtype=np.int64)
        told = f"the prompt of group {request.group_id} holds"
        if (ids == self._model.mask_id).any():
            raise ValueError(f"{told} the mask token {self._model.mask_id}")
        if len(wrong := ids[(ids < 0) | (ids >= vocabulary)]):
            raise ValueError(f"{told} token {wrong[0]}, outside the model's vocabulary of {vocabulary}")

    def _under_way(self) -> dict[int, Request]:
        return {item.ticket: item.request for item in (*self._waiting, *self._slots.work.values())}

    def _drop(self, tickets: set[int]) -> None:
        self._waiting = deque(item for item in self._waiting if item.ticket not in tickets)
        self._retire(np.isin(self._slots.column("ticket"), list(tickets)))

    def _round(self) -> None:
        """One pass for everything that is active."""
        try:
            self._advance()
        except torch.AcceleratorError:
            self._broken = True
            raise

    @torch.inference_mode()
    def _advance(self) -> None:
        if self._proof is UNPROVEN:
            raise RuntimeError("nothing is decoded with half an update of the weights, which failed; load them again")
        start = time.perf_counter()
        inside = self._stats.forward_seconds + self._stats.sampling_seconds
        self._admit()
        self._read_ahead()
        ended = self._denoise()
        if ended.any():
            self._ended.update(self._finish(ended))
        inside = self._stats.forward_seconds + self._stats.sampling_seconds - inside
        self._stats.host_seconds += time.perf_counter() - start - inside

    def _admit(self) -> None:
        """Give waiting requests the free slots, in order."""
        if self._graphs and self._filled:
            free = self._filled - self._slots.active
            if free < min(max(1, self._filled // _TOGETHER), len(self._waiting)):
                return
        admitted: list[Work] = []
        while self._waiting and not self._full:
            if self._make_room(admitted):
                admitted.append(self._waiting.popleft())
            else:
                self._full = True
        if admitted:
            self._slots.admit(admitted)
        self._filled = self._slots.active if self._waiting else 0

    def _make_room(self, admitted: Sequence[Work]) -> bool:
        """Whether the first that waits has a slot, where need be after making slots longer, shorter or more."""
        (slots, length), first = self._cache.shape, self._waiting[0].limit
        taken = self._slots.active + len(admitted)
        if taken < slots and first <= length:
            return True
        if taken == self._max_batch:
            return False
        wanted = min(self._max_batch, taken + len(self._waiting))
        present = max(first, int(self._slots.column("limit").max(initial=0)), *(item.limit for item in admitted))
        longest = max(present, *(item.limit for item in self._waiting))
        # A move of the cache that only adds slots must add a quarter, so that it is a rare one.
        least = taken + 1 if first > length else min(self._max_batch, slots + -(-slots // 4))
        # Room for all that wait, if there is memory for that; otherwise for the first.
        for size, enough in ((longest, wanted), (present, least)):
            for padded in (rounded_up(size), size):
                if (fit := min(self._max_batch, self._positions // padded)) >= max(enough, least):
                    self._resize(min(fit, max(wanted, least, slots, 8)), padded)
                    return True
        return False

    def _resize(self, slots: int, length: int) -> None:
        if self._graphs:
            self._graphs.clear()
        try:
            self._slots.resize(slots, length)
            self._cache.resize(slots, length, kept=self._slots.active)
        except RuntimeError as error:
            size = in_bytes(slots * length * self._cache.bytes_per_position)
            raise RuntimeError(
                f"no memory for {size} of keys and values, {slots} sequences of {length} tokens: lower "
                f"actors.cache_gb={self._cache_gb:g} or actors.max_batch={self._max_batch}"
            ) from error

    def _read_ahead(self) -> None:
        """Passes for what is not in the cache and would make the round's pass exceed ``pass_tokens``."""
        block, block_size = self._slots.column("block"), self._slots.column("block_size")
        committed = self._slots.column("committed")
        while (block + block_size - committed).sum() > self._pass_tokens:
            pending = block - committed
            rows = np.flatnonzero(pending > block_size)
            if not len(rows):
                return  # only denoising is left, however much of it
            # As many neighbours as fit are read whole; a prompt that alone is too long, in pieces of whole blocks.
            neighbours = rows == rows[0] + np.arange(len(rows))
            fits = neighbours & (pending[rows].cumsum() <= self._pass_tokens)
            rows = rows[: max(1, fits.sum())]
            piece = max(1, self._pass_tokens // block_size[rows[0]]) * block_size[rows[0]]
            end = committed[rows] + np.minimum(pending[rows], piece) if len(rows) == 1 else block[rows].copy()
            self._forward(rows, committed[rows], end)
            self._stats.prefills += 1
            committed[rows] = end

    def _forward(
        self, slot: IntArray, start: IntArray, end: IntArray, steps: Sequence[_Step] = ()
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Run positions start..end of neighbouring slots, all [k]; returns hidden states [M, hidden] of the masked
        positions of ``steps``, one step after another, and the steps' arrays on the device."""
        began = time.perf_counter()
        fields = self._slots.fields[slot]
        rows = Rows(slot=slot, start=start, end=end, block_size=fields["block_size"], source=fields["source"])
        also = [array for step in steps for array in step.arrays]
        if self._graphs and steps and (run := self._graphs.find(rows)):
            sent: Sequence[torch.Tensor] = send_together(also, self._model.device)
            hidden = run(rows).index_select(0, torch.cat([plan[0] for plan in sent[::2]]))
            self._stats.graphed += 1
        else:
            layout = RaggedLayout(self._cache, rows, groups=self._decoder.groups, also=also)
            sent = layout.also
            ids = self._slots.ids[layout.slot_N, layout.position_N]
            wanted = torch.cat([layout.slot_N[:0], *(plan[0] for plan in sent[::2])])
            hidden = self._decoder.hidden(ids, layout.position_N, layout, wanted)
        self._slots.fields["source"][slot] = -1
        self._stats.forwarded_tokens += int(rows.lengths.sum())
        self._stats.forward_seconds += time.perf_counter() - began
        return hidden, sent

    def _denoise(self) -> NDArray[np.bool_]:
        """One denoising step of every active sequence, with all that is due; returns [n] which ended."""
        slots = self._slots
        n, block, block_size = slots.active, slots.column("block"), slots.column("block_size")
        new = np.flatnonzero(slots.column("block_step") == 0)
        slots.versions[new, block[new] // block_size[new] - slots.column("prompt")[new] // block_size[new]] = (
            self._proof.version
        )
        start, end = slots.column("committed"), block + block_size
        slots.column("step")[:] += 1
        last = (end - start).cumsum()
        rules = slots.column("rule")
        steps = [self._plan(np.flatnonzero(rules == rule), int(rule), last) for rule in np.unique(rules)]
        hidden, sent = self._forward(np.arange(n), start, end, steps)
        start[:] = block
        self._stats.forwards += 1
        self._stats.sequence_steps += n
        began = time.perf_counter()
        parts = hidden.split([step.places.shape[1] for step in steps])
        found = [self._step(h, step, *sent[2 * i : 2 * i + 2]) for i, (h, step) in enumerate(zip(parts, steps))]
        row, offset = np.concatenate([step.places for step in steps], axis=1)
        revealed, stop = torch.cat(found, dim=1).cpu().numpy()  # the one wait for the device
        self._stats.sampling_seconds += time.perf_counter() - began
        return slots.reveal(row[revealed], offset[revealed], stop[revealed])

    def _plan(self, rows: IntArray, rule: int, last: IntArray) -> _Step:
        """A step of ``rows``, which share decoding settings and whose queries end before ``last``."""
        slots, b = self._slots, self._rules[rule].block_size
        masked = slots.masked[rows, :b]
        local, offset = masked.nonzero()
        row = rows[local]
        position = slots.fields["block"][row] + offset
        plan = [
            last[row] - b + offset,
            slots.fields["seed"][row],
            position,
            slots.fields["step"][row],
            row * slots.shape[1] + position,
            local * b + offset,
        ]
        return _Step(
            rule=rule,
            masked=masked,
            places=np.stack([row, offset]),
            arrays=(np.stack(plan), slots.fields["block_step"][rows]),
        )

    def _step(self, hidden: torch.Tensor, step: _Step, plan: torch.Tensor, block_step: torch.Tensor) -> torch.Tensor:
        """Draw and reveal. Returns which masked positions were revealed and hold a stop token, bool [2, M]."""
        slots = self._slots
        _, seed_M, position_M, step_M, state_M, dense_M = plan
        found = denoise(
            self._model.logits,
            hidden,
            Positions(seed=seed_M, position=position_M, step=step_M, dense=dense_M),
            step.masked,
            block_step,
            self._rules[step.rule],
            vocabulary=len(self._model.suppressed_V),
        )
        slots.ids.view(-1)[state_M] = torch.where(found.mask, found.token, self._model.mask_id)
        slots.logprobs.view(-1)[state_M] = found.logprob
        slots.steps.view(-1)[state_M] = step_M.to(torch.int32)
        return torch.stack([found.mask, torch.isin(found.token, self._stops[step.rule])])

    def _finish(self, ended: NDArray[np.bool_]) -> list[tuple[int, Trajectory]]:
        found = self._slots.trajectories(ended)
        for _, trajectory in found:
            self._stats.sequences += 1
            self._stats.completion_tokens += trajectory.completion_len
            self._stats.blocks += trajectory.blocks
            self._stats.denoising_steps += trajectory.denoising_steps
        self._retire(ended)
        return found

    @torch.inference_mode()
    def _retire(self, ended: NDArray[np.bool_]) -> None:
        source, target = self._slots.close(ended)
        if len(source):
            self._cache.move(source, target)
        self._full = False


def in_bytes(count: float) -> str:
    """In the largest unit of which there is one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
