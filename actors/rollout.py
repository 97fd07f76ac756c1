"""The rollout actor: an engine, its tokenizer, and proof of the weights it serves.

    controller ──generate(requests, decoding, version)──► trajectories and texts     up to CALLS at a time
    learner ───► object store ──load_weights(published)──► Proof(version, checksum)  also while it decodes
    supervisor ──progress()──► passes so far                                         always answered

`RolloutWorker` is a plain class; `remote_class` puts Ray around it, with a thread for weights and one for probes
beside those that decode. It refuses work for weights newer than those it proved (invariant 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from actors.engine import Engine, EngineStats
from actors.torch_engine import TorchEngine
from tstar_ray.config import ActorsConfig, ModelConfig
from tstar_ray.decoding import Decoding
from tstar_ray.model import load_checkpoint, pick_device
from tstar_ray.place import Place, here
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof


class WeightSource(Protocol):
    """How published weights are fetched; see cluster.weights."""

    def fetch(self, published: Any) -> torch.Tensor:
        """The flat buffer."""


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
        device, dtype = pick_device(gpus=self._actors.gpus, dtype=self._model.dtype)
        checkpoint = load_checkpoint(
            self._model.path, mask_token_id=self._model.mask_token_id, dtype=dtype, device=device
        )
        self._tokenizer = checkpoint.tokenizer
        self._engine: Engine = TorchEngine(
            checkpoint.model,
            max_batch=self._actors.max_batch,
            cache_gb=self._actors.cache_gb,
            cache_update=self._actors.cache_update,
        )
        return here(repr(self))

    def load_weights(self, published: Any) -> Proof:
        """Fetch, load between two denoising steps, and prove what is now served."""
        return self._engine.load_weights(self._weights.fetch(published), published.version)

    def generate(self, requests: Sequence[Request], decoding: Decoding, version: int) -> list[tuple[Trajectory, str]]:
        """A trajectory and its text for each request, in order, decoded by this weight version or newer ones."""
        torch.set_num_threads(self._threads)  # a setting of the calling thread
        if self._engine.proof.version < version:
            raise RuntimeError(f"{self!r} serves weights {self._engine.proof.version}, asked to decode with {version}")
        trajectories = self._engine.generate(requests, decoding)
        texts = self._tokenizer.batch_decode(
            [t.completion_ids.tolist() for t in trajectories], skip_special_tokens=True
        )
        return list(zip(trajectories, texts))

    def cancel(self, group_ids: Sequence[int]) -> None:
        """Give up what belongs to these groups; the calls that asked for it fail."""
        self._engine.cancel(group_ids)

    def progress(self) -> int:
        """Passes so far; one that decodes moves on."""
        return self._engine.stats.passes

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
