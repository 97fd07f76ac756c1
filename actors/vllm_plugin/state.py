"""The canvas of every request in the runner, and block-causal attention over the paged cache.

    request ──► slot: rule, seed, B, grid position, steps (host) · canvas, step map, log-probs (device)

**Attention.** A canvas sees the cache and all of itself, so that a pass over canvases is an ordinary non-causal one. A
prompt is cut into blocks, each a *virtual request* of its own, with the same pages and a length that ends with it.

**What is masked** is known on the host, one step late: the sampler copies what it revealed without waiting, and the
next step's sampler reads it (`settle`), after that step's forward pass was launched. That is the plugin's only wait for
the device; where steps are not scheduled ahead, vLLM has waited for the same step before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from actors.denoise import to_device
from actors.vllm_plugin.wire import Job
from tstar_ray.decoding import Decoding

_FIELDS = np.dtype(
    [
        ("used", "?"),  # a request has the slot
        ("rule", "i8"),  # index of its decoding settings
        ("width", "i8"),  # B
        ("seed", "i8"),
        ("start", "i8"),  # first position of the canvas
        ("tail", "i8"),  # prompt tokens in it
        ("step", "i8"),  # denoising steps taken
        ("block_step", "i8"),  # of them in the current block
        ("version", "i8"),  # oldest weights that revealed a token of the current block
    ]
)


class Canvases:
    """S slots of C positions."""

    def __init__(self, slots: int, width: int, *, mask_id: int, device: torch.device) -> None:
        self.mask_id, self.device = mask_id, device
        self.version = 0
        """Of the weights that the model holds."""
        self.rules: list[Decoding] = []
        """Decoding settings in use so far; slots name them by index."""
        self.fields = np.zeros(slots, dtype=_FIELDS)
        """[S], see the source for its columns."""
        self.masked = np.zeros((slots, width), dtype=bool)
        """[S, C] positions still to be revealed."""
        self.ids = torch.full((slots, width), mask_id, dtype=torch.long, device=device)
        """[S, C] what the next pass reads."""
        self.steps = torch.zeros((slots, width), dtype=torch.int32, device=device)
        """[S, C] step that revealed each token."""
        self.logprobs = torch.zeros((slots, width), device=device)
        """[S, C] recorded log-probs."""
        self._revealed: tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor, Any] | None = None

    def admit(self, slot: int, job: Job) -> None:
        """A request takes a slot; its first block begins once its prompt is read. What a request before it has revealed
        in the step under way changes nothing here: until then no position is masked."""
        if job.decoding not in self.rules:
            self.rules.append(job.decoding)
        self.masked[slot] = False
        self.fields[slot] = (
            True,
            self.rules.index(job.decoding),
            job.decoding.block_size,
            job.seed,
            0,
            0,
            job.steps,
            0,
            0,
        )

    def begin(self, slots: NDArray[np.int64], start: NDArray[np.int64], tail: NDArray[np.int64]) -> None:
        """The next block of ``slots`` [k] begins at ``start``, with ``tail`` positions already known."""
        fields = self.fields
        fields["start"][slots], fields["tail"][slots], fields["block_step"][slots] = start, tail, 0
        offset = np.arange(self.masked.shape[1])
        self.masked[slots] = (offset >= tail[:, None]) & (offset < fields["width"][slots, None])
        self.ids[to_device(slots, self.device)] = self.mask_id

    def reveal_later(self, slot: NDArray[np.int64], offset: NDArray[np.int64], revealed: torch.Tensor) -> None:
        """Masked positions (slot, offset) [M] were revealed where ``revealed`` says so, which is still on its way."""
        event = None
        if self.device.type == "cuda":
            revealed = revealed.to("cpu", non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._revealed = (slot, offset, revealed, event)

    def settle(self) -> None:
        """Take note of what the last step revealed."""
        if self._revealed is None:
            return
        slot, offset, revealed, event = self._revealed
        if event is not None:
            event.synchronize()
        here = revealed.numpy()
        self.masked[slot[here], offset[here]] = False
        self._revealed = None


class BlockDiffusionState(DefaultModelState):
    """vLLM's hook for what is special about a model."""

    supports_prompt_embeds = False
    num_new_sampled_tokens_per_step = 0  # a canvas, and no token beside it

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        assert vllm_config.diffusion_config is not None
        self.canvases = Canvases(
            self.max_num_reqs,
            vllm_config.diffusion_config.canvas_length,
            mask_id=int(self.model_config.hf_config.mask_token_id),
            device=device,
        )
        self._slots: dict[str, int] = {}

    def get_supported_generation_tasks(self) -> tuple[Any, ...]:
        """Text."""
        return ("generate",)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A new request, or one that was preempted and comes back with the blocks it has finished."""
        super().add_request(req_index, new_req_data)
        parameters: Any = new_req_data.sampling_params
        self._slots[new_req_data.req_id] = req_index
        self.canvases.admit(req_index, Job.from_wire(parameters.extra_args))

    def remove_request(self, req_id: str) -> None:
        """Finished or preempted."""
        super().remove_request(req_id)
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self.canvases.fields["used"][slot] = False

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """In place of vLLM's."""
        from actors.vllm_plugin.sampler import BlockDiffusionSampler

        return BlockDiffusionSampler(self.canvases, self.model, sampler), None

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        """Non-causal attention; prompts in virtual requests of one block each."""
        full = cudagraph_mode == CUDAGraphMode.FULL
        requests = input_batch.num_reqs_after_padding if full else input_batch.num_reqs
        tokens = input_batch.num_tokens_after_padding if full else input_batch.num_tokens
        ends = input_batch.query_start_loc_np[: requests + 1]
        ends_device, lengths = input_batch.query_start_loc[: requests + 1], input_batch.seq_lens
        longest = int(input_batch.num_scheduled_tokens.max())
        # The longest sequence decides whether kernels split the keys; a recording must do for all.
        known = input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs]
        farthest = self.max_model_len if for_capture else int(known.max())
        if not for_capture and (reading := input_batch.is_prefilling_np[: input_batch.num_reqs]).any():
            assert not full, "a pass that reads prompts has no graph"
            owner, size, after = self._cut(np.diff(ends), reading, input_batch.idx_mapping_np)
            ends = np.concatenate([[0], size.cumsum()]).astype(np.int32)
            ends_device = to_device(ends, self.device)
            row = to_device(owner, self.device)
            lengths = lengths[row] - to_device(after.astype(np.int32), self.device)
            block_tables = tuple(table[row] for table in block_tables)
            requests, longest = len(owner), int(size.max())
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=requests,
            num_tokens=tokens,
            query_start_loc_gpu=ends_device,
            query_start_loc_cpu=torch.from_numpy(np.ascontiguousarray(ends)),
            max_query_len=longest,
            seq_lens=lengths,
            max_seq_len=farthest,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            for_cudagraph_capture=for_capture,
            causal=False,
            ubatch_idx=ubatch_idx,
        )

    def _cut(
        self, queries: NDArray[np.int32], reading: NDArray[np.bool_], slots: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Virtual requests [v]: the request each belongs to, its queries, and queries of that request after it."""
        width = np.where(reading, self.canvases.fields["width"][slots[: len(reading)]], np.maximum(queries, 1))
        pieces = -(-queries // width)
        owner = np.repeat(np.arange(len(queries)), pieces)
        first = np.repeat(pieces.cumsum() - pieces, pieces)
        begin = (np.arange(len(owner)) - first) * width[owner]
        end = np.minimum(begin + width[owner], queries[owner])
        return owner, end - begin, queries[owner] - end
