"""One denoising step, or commit, of every canvas in a pass; in place of vLLM's sampler.

    hidden states ──► masked rows only ──► LM head ──► draw ──► choose ──► canvas, step map, log-probs
                  └─► finished canvases: emit tokens and trace, begin the next block

Who is masked is known on the host (`Canvases.settle`, the one wait), so that the LM head runs on masked rows alone and
on none of a commit.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from actors.denoise import Positions, denoise, rows_at_once, to_device
from actors.vllm_plugin.state import Canvases
from tstar_ray.decoding import Decoding


class BlockDiffusionSampler:
    """See the module."""

    def __init__(self, canvases: Canvases, model: Any, base: Any) -> None:
        """``base`` is vLLM's sampler, whose request states hold the canvases that the runner reads."""
        self._canvases, self._model = canvases, model
        self._requests = base.req_states
        self.sampling_states = base.sampling_states
        self.penalties_state = SimpleNamespace(output_bin_counts=None)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Nothing: `BlockDiffusionState.add_request` has all it takes."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, hidden: torch.Tensor, batch: InputBatch, draft_logits: Any = None) -> SamplerOutput:
        """``hidden`` [rows of all canvases, hidden] of the R requests of a pass."""
        canvases = self._canvases
        canvases.settle()
        fields, n = canvases.fields, batch.num_reqs
        slots = batch.idx_mapping_np[:n].astype(np.int64)
        first = batch.cu_num_logits_np[:n].astype(np.int64)
        rows = np.diff(batch.cu_num_logits_np[: n + 1])
        width = fields["width"][slots]
        if not fields["used"][slots].any():
            self._rehearse(hidden)
        # A canvas that was cut where the model's length ends has no step to take.
        whole = (rows == width) & fields["used"][slots]
        dirty = canvases.masked[slots].any(axis=1)
        denoise, commit = np.flatnonzero(whole & dirty), np.flatnonzero(whole & ~dirty)
        emitted, rejected = np.zeros(n, dtype=np.int32), rows.astype(np.int32)
        emitted[commit], rejected[commit] = (width - fields["tail"][slots])[commit], 0
        sampled = torch.zeros((n, canvases.ids.shape[1]), dtype=torch.int32, device=hidden.device)
        trace = self._emit(sampled, slots, commit, emitted) if len(commit) else None
        if len(denoise):
            self._denoise(hidden, slots[denoise], first[denoise])
        read = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        ready = np.flatnonzero((rows == 0) & read & fields["used"][slots])
        if len(ready):
            rejected[ready] = self._first_block(slots[ready], batch.prefill_len_np[ready].astype(np.int64))
        at = batch.idx_mapping[:n]
        self._requests.draft_tokens[at] = canvases.ids[at]
        counts = to_device(np.stack([emitted, rejected]), hidden.device)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=trace,
            num_nans=None,
            num_sampled=counts[0],
            num_rejected=counts[1],
        )

    def _first_block(self, slots: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        """The prompts of ``slots`` are read: back to the grid line before their end. Returns by how much."""
        canvases = self._canvases
        tail = length % canvases.fields["width"][slots]
        canvases.begin(slots, length - tail, tail)
        if tail.any():
            slot = np.repeat(slots, tail)
            offset = np.arange(len(slot)) - np.repeat(tail.cumsum() - tail, tail)
            slot_N, offset_N, position_N = to_device(
                np.stack([slot, offset, canvases.fields["start"][slot] + offset]), canvases.device
            )
            canvases.ids[slot_N, offset_N] = self._requests.all_token_ids.gpu[slot_N, position_N].long()
        return tail

    def _emit(
        self,
        sampled: torch.Tensor,
        slots: NDArray[np.int64],
        commit: NDArray[np.int64],
        emitted: NDArray[np.int32],
    ) -> LogprobsTensors:
        """Tokens and trace of finished canvases; their next blocks begin."""
        canvases, columns = self._canvases, sampled.shape[1]
        count, here = emitted[commit], slots[commit]
        fields = canvases.fields
        local = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        at = np.stack(
            [
                np.repeat(here * columns + fields["tail"][here], count) + local,
                np.repeat(commit * columns, count) + local,
                np.repeat(fields["version"][here], count),
            ]
        )
        from_N, to_N, version_N = to_device(at, canvases.device)
        token_N = canvases.ids.view(-1)[from_N]
        sampled.view(-1)[to_N] = token_N.int()
        logprob_N = canvases.logprobs.view(-1)[from_N]
        trace = LogprobsTensors(
            logprob_token_ids=torch.stack([token_N, version_N], dim=1).int(),
            logprobs=torch.stack([logprob_N, torch.zeros_like(logprob_N)], dim=1),
            selected_token_ranks=canvases.steps.view(-1)[from_N],
            cu_num_generated_tokens=[0, *emitted.cumsum().tolist()],
        )
        canvases.begin(here, fields["start"][here] + fields["width"][here], np.zeros_like(here))
        return trace

    def _denoise(self, hidden: torch.Tensor, slots: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        """A step of ``slots`` [k], whose canvases begin at rows ``first`` [k] of ``hidden``."""
        canvases, fields = self._canvases, self._canvases.fields
        fields["version"][slots] = np.where(
            fields["block_step"][slots] == 0, canvases.version, fields["version"][slots]
        )
        fields["step"][slots] += 1
        rules = fields["rule"][slots]
        found = []
        for rule in np.unique(rules):
            part = rules == rule
            found.append(self._step(hidden, slots[part], first[part], canvases.rules[rule]))
        slot, offset, revealed = zip(*found)
        canvases.reveal_later(np.concatenate(slot), np.concatenate(offset), torch.cat(revealed))
        fields["block_step"][slots] += 1

    def _step(
        self, hidden: torch.Tensor, slots: NDArray[np.int64], first: NDArray[np.int64], decoding: Decoding
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]:
        """Draw and reveal for ``slots``, which share decoding settings; returns their masked positions (slot,
        offset) [M], and which of them were revealed [M], on the device."""
        canvases, fields, b, device = self._canvases, self._canvases.fields, decoding.block_size, hidden.device
        masked = canvases.masked[slots, :b]
        local, offset = masked.nonzero()
        slot = slots[local]
        plan = np.stack(
            [
                first[local] + offset,
                fields["seed"][slot],
                fields["start"][slot] + offset,
                fields["step"][slot],
                slot * canvases.masked.shape[1] + offset,
                local * b + offset,
            ]
        )
        hidden_M, seed_M, position_M, step_M, state_M, dense_M = to_device(plan, device)
        found = denoise(
            self._model.logits,
            hidden[hidden_M],
            Positions(seed=seed_M, position=position_M, step=step_M, dense=dense_M),
            masked,
            fields["block_step"][slots],
            decoding,
            vocabulary=self._model.config.vocab_size,
        )
        canvases.ids.view(-1)[state_M] = torch.where(found.mask, found.token, canvases.mask_id)
        canvases.logprobs.view(-1)[state_M] = found.logprob
        canvases.steps.view(-1)[state_M] = step_M.int()
        return slot, offset, found.mask

    def _rehearse(self, hidden: torch.Tensor) -> None:
        """vLLM measures its memory without any request: take the most that a step may take."""
        decoding = Decoding(block_size=1, max_new_tokens=1, stop_ids=(), strategy="entropy", top_p=0.9)
        rows = rows_at_once(hidden.device, self._model.config.vocab_size)
        rows = min(rows, len(hidden) * self._canvases.ids.shape[1])
        index = torch.arange(rows, device=hidden.device)
        denoise(
            self._model.logits,
            hidden[:1].expand(rows, -1),
            Positions(seed=index, position=index, step=index, dense=index),
            np.ones((rows, 1), dtype=bool),
            np.zeros(rows, dtype=np.int64),
            decoding,
            vocabulary=self._model.config.vocab_size,
        )
