"""Block-diffusion decoding by vLLM: an engine for paged caches, tensor parallelism and long queues.

    requests ──► vLLM's engine core, in this process ──► a block at a time, with its trace ──► trajectories
                   └── scheduler, workers: actors.vllm_plugin
    weights  ──flat buffer, or vLLM's weight transfer──► workers ──► checksum of what they serve

The contract is that of the PyTorch engine, and so are the tokens: both share drawing, unmasking and random numbers.
What differs:

- **A commit is a pass of its own**, without logits. ``EngineStats.forwards`` counts it.
- **New weights** under ``recompute`` preempt all sequences: they read their blocks again and begin their present
  block anew, so that a whole block, and its cache, is of one version. Under ``keep`` they go on as they are.
- **Cached prompts** are shared between requests of one block size and weight version only: both are in the salt.
  Requests that wait, or wait again, take the salt of new weights; under ``keep`` pages of the old ones stay meanwhile.
- **Preempted** sequences (the cache ran full) come back with the same tokens: random numbers are counters.

The engine core runs where its callers wait for it, as in the PyTorch engine; with ``tensor_parallel`` its workers are
processes of their own. vLLM is imported when an engine is built (actors.vllm_serving).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.engine import UNPROVEN, EngineStats
from actors.rounds import Rounds
from actors.vllm_plugin.wire import Job
from actors.vllm_serving import Serving, check_servable, start
from tstar_ray.blocks import decode_limit
from tstar_ray.decoding import Decoding
from tstar_ray.model_files import Blueprint
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof


@dataclass(slots=True)
class _Work:
    """One request under way, with what it has so far."""

    request: Request
    decoding: Decoding
    ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    stale: bool = False


class VllmEngine(Rounds):
    """An `actors.engine.Engine` on vLLM."""

    def __init__(self, blueprint: Blueprint, serving: Serving, *, version: int = 0) -> None:
        """Loads the checkpoint. Raises ValueError where it cannot be served as asked."""
        super().__init__()
        check_servable(blueprint, serving)
        self._blueprint, self._serving = blueprint, serving
        self._stats = EngineStats()
        self._work: dict[int, _Work] = {}
        self._core = start(blueprint, serving)
        self._threads = torch.get_num_threads()
        self._device_stream = torch.cuda.current_stream() if serving.device == "cuda" else None
        self._failed = False
        self._scheduler = self._core.engine_core.scheduler
        self._layout = [(name, shape) for name, shape in blueprint.layout]
        self._proof = self._prove(version)

    @property
    def proof(self) -> Proof:
        """Version and checksum of the weights it serves."""
        return self._proof

    @property
    def stats(self) -> EngineStats:
        """Totals so far; time in the model includes sampling, and commits count as passes that denoise."""
        counts = self._scheduler.counts
        return dataclasses.replace(
            self._stats,
            forwards=counts.denoising,
            prefills=counts.reading,
            forwarded_tokens=counts.tokens,
            sequence_steps=counts.canvases,
        )

    @property
    def broken(self) -> bool:
        """See `actors.engine.Engine.broken`: vLLM does not replace a worker that died, nor agree again with several
        of which one failed alone."""
        executor = self._core.engine_core.model_executor
        workers = getattr(executor, "workers", ())
        return (
            self._failed
            or getattr(executor, "is_failed", False)
            or any(not worker.proc.is_alive() for worker in workers)
        )

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """See `actors.engine.Engine.load_weights`."""
        expected = sum(math.prod(shape) for _, shape in self._layout)
        if flat.numel() != expected:
            raise ValueError(f"flat buffer holds {flat.numel()} values, the model has {expected} parameters")
        with self.paused(), self._shared(flat) as buffer:
            self._proof = UNPROVEN
            dtype = str(flat.dtype).removeprefix("torch.")
            self._core.collective_rpc("tstar_load", args=(buffer, dtype, self._layout))
            return self._renew(version)

    def join_transfer(self, info: dict[str, Any]) -> None:
        """Meet a trainer for vLLM's weight transfer; ``info`` is what its side of the backend says."""
        with self.paused():
            self._core.collective_rpc("init_weight_transfer_engine", args=(info,))

    def receive_weights(self, info: dict[str, Any], version: int) -> Proof:
        """Take what the trainer broadcasts, between two steps, and prove what is now served."""
        with self.paused():
            self._proof = UNPROVEN
            self._core.collective_rpc("start_weight_update")
            self._core.collective_rpc("update_weights", args=(info,))
            self._core.collective_rpc("finish_weight_update")
            return self._renew(version)

    def sleep(self) -> None:
        """See `actors.engine.Engine.sleep`. vLLM's cache is one piece: its contents go, its memory stays."""
        with self.paused():
            if self._work:
                raise RuntimeError(f"{len(self._work)} sequences are being decoded or wait")
            self._core.reset_prefix_cache()

    def close(self) -> None:
        """End vLLM's workers."""
        self._core.shutdown()

    def _renew(self, version: int) -> Proof:
        """Weights have changed: no cache of the old ones may serve the new."""
        if self._serving.cache_update == "recompute":
            self._core.reset_prefix_cache(reset_running_requests=True)
        else:
            # While anything runs, vLLM keeps all pages.
            self._core.reset_prefix_cache()
        for ticket, work in self._work.items():
            known = self._scheduler.requests.get(str(ticket))
            if known is not None and known.num_computed_tokens:
                work.stale = True
            elif known is not None:
                known.cache_salt = self._salt(work.decoding, version)
                known.block_hashes.clear()
                known.update_block_hashes()
        self._proof = self._prove(version)
        return self._proof

    @staticmethod
    def _salt(decoding: Decoding, version: int) -> str:
        return f"block {decoding.block_size}, weights {version}"

    def _prove(self, version: int) -> Proof:
        self._core.collective_rpc("tstar_serve", args=(version,))
        checksum: str = self._core.collective_rpc("tstar_checksum", args=(self._layout,))[0]
        return Proof(version, checksum)

    @contextmanager
    def _shared(self, flat: torch.Tensor) -> Iterator[torch.Tensor | str]:
        """The buffer as all workers can read it: itself, or a file in memory that they map."""
        if self._serving.tensor_parallel == 1:
            yield flat
            return
        shared = Path("/dev/shm")  # containers often have little of it
        folder = shared if shared.is_dir() and shutil.disk_usage(shared).free > flat.nbytes else None
        with tempfile.NamedTemporaryFile(prefix="tstar-weights-", dir=folder) as file:
            Path(file.name).write_bytes(flat.contiguous().view(torch.uint8).numpy().data)
            yield file.name

    def _submit(self, requests: Sequence[Request], decoding: Decoding) -> list[int]:
        """Queue requests; they join the batch in the next rounds."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        with self.paused():
            limits = [self._limit(request, decoding) for request in requests]
            tickets = []
            for request, limit in zip(requests, limits):
                ticket = next(self._tickets)
                b = decoding.block_size
                job = Job(decoding=decoding.varied(request.variant), seed=request.seed, limit=limit)
                self._core.add_request(
                    EngineCoreRequest(
                        request_id=str(ticket),
                        prompt_token_ids=list(request.prompt_ids),
                        mm_features=None,
                        sampling_params=SamplingParams(
                            max_tokens=limit - len(request.prompt_ids),
                            logprobs=0,  # the trace travels with them
                            ignore_eos=True,
                            detokenize=False,
                            # A page that ends inside a block holds keys and values that are not final.
                            skip_reading_prefix_cache=self._serving.page % b != 0,
                            extra_args=job.to_wire(),
                        ),
                        pooling_params=None,
                        arrival_time=time.time(),
                        lora_request=None,
                        cache_salt=self._salt(decoding, self._proof.version),
                        data_parallel_rank=None,
                    )
                )
                self._work[ticket] = _Work(request, decoding)
                tickets.append(ticket)
            return tickets

    def _limit(self, request: Request, decoding: Decoding) -> int:
        """Where a request must end. Raises ValueError for one that can never be served."""
        serving, prompt = self._serving, len(request.prompt_ids)
        told = f"group {request.group_id}"
        if not prompt:
            raise ValueError(f"the prompt of {told} is empty; actors.engine=vllm needs at least one token")
        if self._blueprint.mask_id in request.prompt_ids:
            raise ValueError(f"the prompt of {told} holds the mask token {self._blueprint.mask_id}")
        if decoding.block_size > serving.max_block:
            raise ValueError(
                f"block_size={decoding.block_size} exceeds the {serving.max_block} that vLLM was started for; "
                "raise actors.vllm.max_block"
            )
        cap = min(request.max_new_tokens or decoding.max_new_tokens, decoding.max_new_tokens)
        limit = decode_limit(prompt, cap, decoding.block_size)
        if limit > serving.max_tokens:
            raise ValueError(
                f"one sequence of {limit} tokens exceeds the {serving.max_tokens} that vLLM was started for; "
                "raise actors.vllm.max_tokens or lower max_new_tokens"
            )
        return limit

    def _settle(self) -> None:
        """Callers take turns, and vLLM has to find the same settings of the thread in all of them: CPU kernels the
        number of threads, the GPU the stream, on which steps and weights wait for one another."""
        torch._C.set_num_threads(self._threads)  # vLLM puts a function that does nothing in the place of torch's own
        if self._device_stream is not None:
            torch.cuda.set_stream(self._device_stream)
        super()._settle()

    def _round(self) -> None:
        """One step of vLLM."""
        try:
            self._step()
        except Exception as error:
            self._failed |= self._serving.tensor_parallel > 1 or isinstance(error, torch.AcceleratorError)
            raise

    def _step(self) -> None:
        began = time.perf_counter()
        outputs = self._core.get_output().outputs
        decoded = time.perf_counter()
        for output in outputs:
            self._take(output)
        self._stats.forward_seconds += decoded - began
        self._stats.host_seconds += time.perf_counter() - decoded

    def _take(self, output: Any) -> None:
        """A block of one request, or its end."""
        ticket = int(output.request_id)
        work = self._work.get(ticket)
        if work is None:  # given up meanwhile
            return
        if output.new_token_ids:
            trace = output.new_logprobs
            work.ids += output.new_token_ids
            work.steps += trace.sampled_token_ranks.tolist()
            work.logprobs += trace.logprobs[:, 0].tolist()
            work.versions.append(int(trace.logprob_token_ids[0, 1]))
        if output.finish_reason is None:
            return
        del self._work[ticket]
        if str(output.finish_reason) not in ("stop", "length"):
            self._ended[ticket] = RuntimeError(f"vLLM ended the sequence: {output.finish_reason}")
            return
        trajectory = self._trajectory(work)
        self._ended[ticket] = trajectory
        self._stats.sequences += 1
        self._stats.completion_tokens += trajectory.completion_len
        self._stats.blocks += trajectory.blocks
        self._stats.denoising_steps += trajectory.denoising_steps

    @staticmethod
    def _trajectory(work: _Work) -> Trajectory:
        prompt, decoding = len(work.request.prompt_ids), work.decoding
        stops = np.flatnonzero(np.isin(work.ids, decoding.stop_ids))
        return Trajectory(
            group_id=work.request.group_id,
            sample=work.request.sample,
            token_ids=np.asarray([*work.request.prompt_ids, *work.ids], dtype=np.int32),
            prompt_len=prompt,
            completion_len=int(stops[0]) + 1 if len(stops) else len(work.ids),
            step_map=np.asarray(work.steps, dtype=np.int32),
            logprobs=np.asarray(work.logprobs, dtype=np.float32),
            block_size=decoding.block_size,
            temperature=decoding.temperature,
            weight_versions=np.asarray(work.versions, dtype=np.int64),
            stale_cache=work.stale,
            stop_reason="stop" if len(stops) else "length",
        )

    def _under_way(self) -> dict[int, Request]:
        return {ticket: work.request for ticket, work in self._work.items()}

    def _drop(self, tickets: set[int]) -> None:
        known = tickets & self._work.keys()
        for ticket in known:
            del self._work[ticket]
        self._core.abort_requests([str(ticket) for ticket in known])
