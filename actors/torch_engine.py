"""Block-diffusion decoding with a KV cache, in plain PyTorch: the default engine.

One loop, one forward pass a round for all sequences together::

    admit ──► prefill ──► [ denoise ──► reveal ──► block done? ──► stop? ]* ──► trajectory, slot free

**One formula for every pass.** Keys and values are stored at their absolute position, also those of a block
that is still noisy, and each pass overwrites them. A query of block k sees all positions below (k+1)B, so
prefill, denoising and commit need no different masks. A sequence's queries in a pass are the positions from
the first uncommitted one to the end of its current block: B of them, or 2B right after a block was finished,
when the clean block is committed in the same pass that denoises the next one. Committing costs no pass of its
own, and the result is identical (algorithm reference 5.1).

**Ragged passes.** The tokens of all sequences stand end to end in one row, so that projections and MLP spend
nothing on padding; only attention pads to the longest query. The LM head runs at masked positions only.

**Slots.** Active sequences fill the first n of the cache's slots; one that finishes gives its slot to the next
request, whose prompt is prefilled once for all samples of a group. Memory is fixed when the call begins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from actors.engine import EngineStats
from tstar_ray.blocks import decode_limit, decode_visibility
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.unmask import choose, draw, uniforms
from tstar_ray.weights import Proof, checksum, flatten, load_flat


class TorchEngine:
    """An `actors.engine.Engine` on one device."""

    def __init__(
        self, model: BlockDiffusionLM, *, max_batch: int = 128, cache_gb: float = 4.0, version: int = 0
    ) -> None:
        """At most ``max_batch`` sequences at once, and as many as fit into ``cache_gb`` GiB of keys and values."""
        self._model = model.eval()
        self._max_batch = max_batch
        self._cache_bytes = int(cache_gb * 2**30)
        self._proof = Proof(version, checksum(flatten(model)))
        self._stats = EngineStats()

    @property
    def proof(self) -> Proof:
        """Version and checksum of the weights it serves."""
        return self._proof

    @property
    def stats(self) -> EngineStats:
        """Totals so far."""
        return self._stats

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """Copy the weights in; caches live only inside `generate`, so none can outlive them."""
        load_flat(self._model, flat)
        self._proof = Proof(version, checksum(flatten(self._model)))
        return self._proof

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """One trajectory a request, in order."""
        if not requests:
            return []
        start = time.perf_counter()
        batch = _Batch(self._model, requests, decoding, self._slots(requests, decoding), self._proof.version)
        trajectories = batch.run()
        self._stats = replace(
            self._stats,
            completion_tokens=self._stats.completion_tokens + sum(t.completion_len for t in trajectories),
            sequences=self._stats.sequences + len(trajectories),
            forwards=self._stats.forwards + batch.forwards,
            prefills=self._stats.prefills + batch.prefills,
            sequence_steps=self._stats.sequence_steps + sum(t.denoising_steps for t in trajectories),
            seconds=self._stats.seconds + time.perf_counter() - start,
        )
        return trajectories

    def _slots(self, requests: Sequence[Request], decoding: Decoding) -> int:
        longest = max(decode_limit(len(r.prompt_ids), decoding.max_new_tokens, decoding.block_size) for r in requests)
        config = self._model.hf.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(self._model)
        per_sequence = longest * per_token * self._model.dtype.itemsize
        slots = min(self._max_batch, len(requests), self._cache_bytes // per_sequence)
        if slots < 1:
            raise ValueError(
                f"one sequence of {longest} tokens needs {per_sequence / 2**30:.2f} GiB of cache, "
                f"actors.cache_gb allows {self._cache_bytes / 2**30:.2f}; raise it or lower max_new_tokens"
            )
        return slots


def _head_dim(model: BlockDiffusionLM) -> int:
    config = model.hf.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class _CacheLayout:
    """One ragged pass over the cache: N query tokens of n slots, stored at (slot, position)."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        slots: int,
        slot_N: torch.Tensor,
        position_N: torch.Tensor,
        query_N: torch.Tensor,
        longest: int,
        key_count: int,
        block_size: int,
        groups: int,
        dtype: torch.dtype,
    ) -> None:
        """``keys`` and ``values`` [layers, slots, T, Hkv, D]; ``query_N`` index of each token in its sequence's
        queries, of which there are at most ``longest``."""
        self._keys, self._values = keys, values
        self._slots, self._longest, self._key_count = slots, longest, key_count
        self._slot_N, self._position_N, self._query_N = slot_N, position_N, query_N
        self._groups = groups
        self._dense = len(slot_N) == slots * longest
        # Padding queries see position 0, so that no softmax is empty; their output is never read.
        visible_end = torch.ones(slots, longest, dtype=torch.long, device=keys.device)
        visible_end[slot_N, query_N] = (position_N // block_size + 1) * block_size
        bias = torch.zeros(slots, longest, key_count, dtype=dtype, device=keys.device)
        bias.masked_fill_(~decode_visibility(key_count, visible_end), -torch.inf)
        self._bias = bias.repeat(1, groups, 1)[:, None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`; R is 1. Query heads that share a key head become more queries."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._slot_N, self._position_N] = key[0].transpose(0, 1)
        values[self._slot_N, self._position_N] = value[0].transpose(0, 1)
        n, q, g = self._slots, self._longest, self._groups
        kv_heads, dim = keys.shape[-2:]
        flat = query[0].transpose(0, 1)
        if self._dense:
            padded = flat.reshape(n, q, kv_heads, g, dim)
        else:
            padded = flat.new_zeros(n, q, *flat.shape[1:])
            padded[self._slot_N, self._query_N] = flat
            padded = padded.view(n, q, kv_heads, g, dim)
        out = F.scaled_dot_product_attention(
            padded.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, g * q, dim),
            keys[:n, : self._key_count].transpose(1, 2),
            values[:n, : self._key_count].transpose(1, 2),
            attn_mask=self._bias,
            scale=scale,
        )
        out = out.view(n, kv_heads, g, q, dim).permute(0, 3, 1, 2, 4).reshape(n, q, kv_heads * g, dim)
        return out.reshape(1, n * q, -1, dim) if self._dense else out[self._slot_N, self._query_N][None]


class _Batch:
    """The state of one `generate` call. S slots, T positions, B block size; n of the slots are active."""

    def __init__(
        self,
        model: BlockDiffusionLM,
        requests: Sequence[Request],
        decoding: Decoding,
        slots: int,
        version: int,
    ) -> None:
        self._model, self._decoding, self._version = model, decoding, version
        self._requests = requests
        self._waiting = deque(range(len(requests)))
        self._done: list[Trajectory | None] = [None] * len(requests)
        self.forwards = self.prefills = 0
        for request in requests:
            if model.mask_id in request.prompt_ids:
                raise ValueError(f"the prompt of group {request.group_id} holds the mask token {model.mask_id}")
        device, b = model.device, decoding.block_size
        self._limits = [decode_limit(len(r.prompt_ids), decoding.max_new_tokens, b) for r in requests]
        length, config = max(self._limits), model.hf.config
        shape = (config.num_hidden_layers, slots, length, config.num_key_value_heads, _head_dim(model))
        self._keys = torch.zeros(shape, dtype=model.dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._ids = torch.full((slots, length), model.mask_id, device=device)
        self._steps = torch.zeros((slots, length), dtype=torch.int32, device=device)
        self._logprobs = torch.zeros((slots, length), device=device)
        # Per slot: request index, seed, prompt length, end of decoding, committed positions, start of the
        # current block, steps taken in all and in this block.
        self._fields = torch.zeros((8, slots), dtype=torch.long, device=device)
        self._quota = torch.tensor([decoding.quota(s) for s in range(decoding.steps)], device=device)
        self._stop = torch.tensor(decoding.stop_ids, device=device)
        self._active = 0

    def run(self) -> list[Trajectory]:
        """Decode every request."""
        while self._waiting or self._active:
            if self._waiting and self._active < self._ids.shape[0]:
                self._admit()
            self._denoise()
        return [trajectory for trajectory in self._done if trajectory is not None]

    def _admit(self) -> None:
        """Give waiting requests the free slots, and prefill each distinct prompt once."""
        b = self._decoding.block_size
        first_of: dict[tuple[int, ...], int] = {}
        copies: list[tuple[int, int]] = []
        prefill: list[tuple[int, int]] = []
        while self._waiting and self._active < self._ids.shape[0]:
            index, slot = self._waiting.popleft(), self._active
            request, self._active = self._requests[index], self._active + 1
            prompt = len(request.prompt_ids)
            clean = prompt // b * b
            self._ids[slot] = self._model.mask_id
            self._ids[slot, :prompt] = torch.tensor(request.prompt_ids, dtype=torch.long)
            self._steps[slot] = 0
            self._fields[:, slot] = torch.tensor([index, request.seed, prompt, self._limits[index], clean, clean, 0, 0])
            source = first_of.setdefault(request.prompt_ids, slot)
            if source != slot:
                copies.append((source, slot))
            elif clean:
                prefill.append((slot, clean))
        if prefill:
            slots = torch.tensor([slot for slot, _ in prefill], device=self._ids.device)
            self._forward(slots, torch.zeros_like(slots), torch.tensor([c for _, c in prefill]).to(slots))
            self.prefills += 1
        if copies:
            source, target = torch.tensor(copies, device=self._ids.device).T
            self._keys[:, target], self._values[:, target] = self._keys[:, source], self._values[:, source]

    def _forward(self, slots: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Run positions start..end of the given slots, all [k]; returns hidden states [N, hidden], end to end."""
        lengths = end - start
        row_N = torch.repeat_interleave(torch.arange(len(slots), device=slots.device), lengths)
        query_N = torch.arange(len(row_N), device=slots.device) - (lengths.cumsum(0) - lengths)[row_N]
        position_N, slot_N = start[row_N] + query_N, slots[row_N]
        layout = _CacheLayout(
            self._keys,
            self._values,
            slots=int(slots.max()) + 1,
            slot_N=slot_N,
            position_N=position_N,
            query_N=query_N,
            longest=int(lengths.max()),
            key_count=int(end.max()),
            block_size=self._decoding.block_size,
            groups=self._groups,
            dtype=self._model.dtype,
        )
        return self._model.hidden(self._ids[slot_N, position_N][None], position_N[None], layout)[0]

    def _denoise(self) -> None:
        """One denoising step of every active sequence, with the commits that are due."""
        n, b = self._active, self._decoding.block_size
        _, seed, prompt, limit, committed, block, step, block_step = self._fields[:, :n]
        slots = torch.arange(n, device=block.device)
        end = block + b
        hidden = self._forward(slots, committed, end)
        self.forwards += 1
        step += 1
        position_SB = block[:, None] + torch.arange(b, device=block.device)
        masked_SB = self._ids[slots[:, None], position_SB] == self._model.mask_id
        row_M, offset_M = masked_SB.nonzero(as_tuple=True)
        position_M = position_SB[row_M, offset_M]
        last_N = (end - committed).cumsum(0)
        logits = self._model.logits(hidden[last_N[row_M] - b + offset_M])
        found = draw(logits, uniforms(seed[row_M], position_M, step[row_M]), self._decoding)
        confidence_SB = found.confidence.new_zeros(n, b)
        confidence_SB[row_M, offset_M] = found.confidence
        entropy_SB = torch.zeros_like(confidence_SB)
        entropy_SB[row_M, offset_M] = found.entropy
        quota = self._quota[block_step.clamp(max=len(self._quota) - 1)]
        reveal_SB = choose(masked_SB, confidence_SB, entropy_SB, quota, self._decoding)
        reveal_M = reveal_SB[row_M, offset_M]
        at = (row_M[reveal_M], position_M[reveal_M])
        self._ids[at] = found.token[reveal_M]
        self._logprobs[at] = found.logprob[reveal_M]
        self._steps[at] = step[at[0]].to(torch.int32)
        committed.copy_(block)
        block_step += 1
        block_done = reveal_SB.sum(-1) == masked_SB.sum(-1)
        tokens_SB = self._ids[slots[:, None], position_SB]
        stops = (torch.isin(tokens_SB, self._stop) & (position_SB >= prompt[:, None])).any(-1)
        finished = block_done & (stops | (end >= limit))
        block += b * (block_done & ~finished)
        block_step *= ~block_done
        if finished.any():
            self._retire(finished)

    def _retire(self, finished: torch.Tensor) -> None:
        """Turn finished slots into trajectories and close the gaps with the last active ones."""
        n, b = self._active, self._decoding.block_size
        for slot in finished.nonzero().flatten().tolist():
            index, _, prompt, _, _, block, _, _ = self._fields[:, slot].tolist()
            self._done[index] = self._trajectory(slot, index, prompt, block + b)
        keep = (~finished).nonzero().flatten()
        self._active = len(keep)
        holes, movers = finished[: self._active].nonzero().flatten(), keep[keep >= self._active]
        for state in (self._ids, self._steps, self._logprobs):
            state[holes] = state[movers]
        for cache in (self._keys, self._values, self._fields):
            cache[:, holes] = cache[:, movers]
        assert len(movers) == len(holes) <= n

    def _trajectory(self, slot: int, index: int, prompt: int, end: int) -> Trajectory:
        request, b = self._requests[index], self._decoding.block_size
        ids = self._ids[slot, :end].to("cpu", torch.int32).numpy().copy()
        stops = np.flatnonzero(np.isin(ids[prompt:], self._decoding.stop_ids))
        return Trajectory(
            group_id=request.group_id,
            sample=request.sample,
            token_ids=ids,
            prompt_len=prompt,
            completion_len=int(stops[0]) + 1 if len(stops) else end - prompt,
            step_map=self._steps[slot, prompt:end].cpu().numpy().copy(),
            logprobs=self._logprobs[slot, prompt:end].cpu().numpy().copy(),
            block_size=b,
            temperature=self._decoding.temperature,
            weight_versions=np.full(end // b - prompt // b, self._version, dtype=np.int64),
            stop_reason="stop" if len(stops) else "length",
        )
