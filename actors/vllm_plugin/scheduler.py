"""vLLM's diffusion schedulers with the stop rule of block diffusion: a request ends with a whole block.

vLLM would cut the block at the stop token; the tokens behind it were visible when those before were revealed, so that
the learner needs them (algorithm reference, traps 13 and 14). The scheduler also keeps what a preempted request must
come back with: how many denoising steps lie behind the blocks that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


@dataclass(slots=True)
class Counts:
    """What was scheduled so far."""

    denoising: int = 0
    """Passes with canvases."""
    reading: int = 0
    """Passes with prompts only."""
    tokens: int = 0
    """Query tokens of all passes."""
    canvases: int = 0
    """Canvases summed over the passes, commits among them."""


class _WholeBlocks(DiffusionScheduler):
    """What both schedulers share."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.counts = Counts()
        self._output: Any = None
        """Of the step whose tokens are being taken."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM does, counted."""
        output = super().schedule(throttle_prefills)
        canvases = len(output.scheduled_spec_decode_tokens)
        self.counts.tokens += output.total_num_scheduled_tokens
        self.counts.canvases += canvases
        if output.total_num_scheduled_tokens:
            self.counts.denoising += canvases > 0
            self.counts.reading += canvases == 0
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """As vLLM does; the traces of this step's blocks are at hand meanwhile."""
        self._output = model_runner_output
        return super().update_from_output(scheduler_output, model_runner_output)

    def _take_block(self, request: Request, new_token_ids: list[int]) -> bool:
        """Append a finished block; returns whether the request ends with it."""
        request.append_output_token_ids(list(new_token_ids))
        parameters: Any = request.sampling_params
        job = parameters.extra_args["tstar"]
        row = self._output.req_id_to_index[request.request_id]
        steps = self._output.logprobs.slice_request(row, len(new_token_ids)).sampled_token_ranks
        job["steps"] = int(steps.max())
        stops = set(job["decoding"]["stop_ids"]).intersection(new_token_ids)
        if stops:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = min(stops)
        elif request.num_tokens >= job["limit"]:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return bool(stops) or request.num_tokens >= job["limit"]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        return new_token_ids, self._take_block(request, new_token_ids)


class BlockScheduler(_WholeBlocks):
    """One step at a time."""


class AsyncBlockScheduler(_WholeBlocks, DiffusionAsyncScheduler):
    """The next step is scheduled while the present one runs."""

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        running = request.status == RequestStatus.RUNNING
        ended = self._take_block(request, new_token_ids)
        # From here on as `AsyncScheduler` does, whose own version appends the tokens and stops at one of them.
        if not is_stale:
            request.num_output_placeholders -= len(new_token_ids)
            assert request.num_output_placeholders >= 0
        if running:
            self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens - request.num_output_placeholders)
        return new_token_ids, ended


assert issubclass(AsyncBlockScheduler, AsyncScheduler)
