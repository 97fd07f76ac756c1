"""The rollout actor: an engine, its tokenizer, and proof of the weights it serves.

    controller ──generate(requests, decoding, version)──► trajectories and texts     up to CALLS at a time
    learner ───► object store ──load_weights(published)──► Proof(version, checksum)  also while it decodes
    supervisor ──progress()──► passes so far                                         always answered

Engines and models are imported where an actor makes its own: a driver that only names this class needs neither.

An actor whose engine is broken for good ends its process: its work is then reissued, and another takes its place; one
that lived on would fail all it is given. `RolloutWorker` is a plain class; `remote_class` puts Ray around it, with a
thread for weights and one for probes beside those that decode. It refuses work for weights newer than those it proved
(invariant 8).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from actors.engine import Engine, EngineStats
from tstar_ray.config import ActorsConfig, ModelConfig
from tstar_ray.decoding import Decoding
from tstar_ray.place import Place, here
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.vllm_serving import Serving
    from tstar_ray.model_files import Blueprint


class WeightSource(Protocol):
    """How published weights are fetched; see cluster.weights."""

    def fetch(self, published: Any) -> torch.Tensor:
        """The flat buffer."""


def make_engine(model: ModelConfig, actors: ActorsConfig) -> tuple[Engine, PreTrainedTokenizerBase]:
    """The engine that ``actors.engine`` names, and the checkpoint's tokenizer. Raises ValueError with the remedy."""
    from tstar_ray.model import load_checkpoint, pick_device
    from tstar_ray.model_files import inspect_checkpoint

    device, dtype = pick_device(gpus=actors.gpus, dtype=model.dtype)
    if actors.engine == "vllm":
        from actors.vllm_engine import VllmEngine

        blueprint, serving = plan_serving(model, actors)
        tokenizer, _ = inspect_checkpoint(model.path, mask_token_id=model.mask_token_id)
        return VllmEngine(blueprint, serving), tokenizer
    from actors.torch_engine import TorchEngine

    checkpoint = load_checkpoint(model.path, mask_token_id=model.mask_token_id, dtype=dtype, device=device)
    engine = TorchEngine(
        checkpoint.model,
        max_batch=actors.max_batch,
        cache_gb=actors.cache_gb,
        cache_update=actors.cache_update,
        cuda_graphs=actors.cuda_graphs,
        triton_kernels=actors.triton_kernels,
    )
    return engine, checkpoint.tokenizer


def check_engine(model: ModelConfig, actors: ActorsConfig) -> None:
    """Raises ValueError with the remedy where the engine that ``actors.engine`` names cannot serve the model."""
    if actors.engine == "vllm":
        from actors.vllm_serving import check_servable

        check_servable(*plan_serving(model, actors))
    elif actors.triton_kernels:
        from actors import kernels

        if not kernels.available():
            raise ValueError(
                "actors.triton_kernels=true: Triton is not installed, which PyTorch for GPUs comes with; install "
                "torch for CUDA, or leave it out"
            )


def plan_serving(model: ModelConfig, actors: ActorsConfig) -> tuple[Blueprint, Serving]:
    """What vLLM is to serve, and how; ``actors.vllm`` has its block size and length filled in."""
    from actors.vllm_serving import Serving
    from tstar_ray.model import read_blueprint

    gpu, vllm = actors.gpus > 0, actors.vllm
    dtype = model.dtype if model.dtype != "auto" else "bfloat16" if gpu else "float32"
    return read_blueprint(model.path, mask_token_id=model.mask_token_id), Serving(
        max_block=vllm.max_block,
        max_tokens=vllm.max_tokens,
        max_batch=actors.max_batch,
        cache_gb=actors.cache_gb,
        memory_share=vllm.memory_share,
        tensor_parallel=vllm.tensor_parallel,
        cache_update=actors.cache_update,
        prefix_caching=vllm.prefix_caching,
        async_scheduling=vllm.async_scheduling,
        device="cuda" if gpu else "cpu",
        dtype=getattr(torch, dtype),
    )


CALLS = 32
"""Calls of `generate` that an actor takes at a time; the engine decodes them together."""


class RolloutWorker:
    """One engine with its own copy of the model."""

    def __init__(
        self, index: int, model: ModelConfig, actors: ActorsConfig, *, threads: int, weights: WeightSource
    ) -> None:
        self._index, self._model, self._actors = index, model, actors
        self._threads, self._weights = threads, weights

    def __repr__(self) -> str:
        return f"Rollout({self._index})"

    def ready(self) -> Place:
        """Load the model, and say where this runs. Not in the constructor, where Ray turns an error into an abort."""
        torch.set_num_threads(self._threads)
        self._engine: Engine
        self._engine, self._tokenizer = make_engine(self._model, self._actors)
        return here(repr(self))

    def load_weights(self, published: Any) -> Proof:
        """Fetch, load between two denoising steps, and prove what is now served."""
        return self._engine.load_weights(self._weights.fetch(published), published.version)

    def generate(self, requests: Sequence[Request], decoding: Decoding, version: int) -> list[tuple[Trajectory, str]]:
        """A trajectory and its text for each request, in order, decoded by this weight version or newer ones."""
        torch.set_num_threads(self._threads)  # a setting of the calling thread
        if self._engine.proof.version < version:
            raise RuntimeError(f"{self!r} serves weights {self._engine.proof.version}, asked to decode with {version}")
        try:
            trajectories = self._engine.generate(requests, decoding)
        except Exception:
            self._end_if_broken()
            raise
        texts = self._tokenizer.batch_decode(
            [t.completion_ids.tolist() for t in trajectories], skip_special_tokens=True
        )
        return list(zip(trajectories, texts))

    def cancel(self, group_ids: Sequence[int]) -> None:
        """Give up what belongs to these groups; the calls that asked for it fail."""
        self._engine.cancel(group_ids)

    def progress(self) -> int:
        """Passes so far; one that decodes moves on."""
        self._end_if_broken()
        return self._engine.stats.passes

    def _end_if_broken(self) -> None:
        if self._engine.broken:
            print(f"{self!r}: a process of the engine is gone; this one ends", file=sys.stderr, flush=True)
            os._exit(1)

    def stats(self) -> EngineStats:
        """Totals of the engine."""
        return self._engine.stats


def remote_class() -> Any:
    """`RolloutWorker` as a Ray actor class; Ray is imported here and nowhere else in this package."""
    import ray

    for group, methods in {"weights": ("load_weights", "cancel"), "health": ("ready", "progress")}.items():
        for method in methods:
            ray.method(concurrency_group=group)(getattr(RolloutWorker, method))
    options: Any = {"max_concurrency": CALLS, "concurrency_groups": {"weights": 1, "health": 1}}
    return ray.remote(**options)(RolloutWorker)
