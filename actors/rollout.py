"""The rollout actor: an engine, its tokenizer, and proof of the weights it serves.

    controller ──generate(requests, decoding, version)──► trajectories and texts
    learner ───► object store ──load_weights(published)──► Proof(version, checksum)

`RolloutWorker` is a plain class; `remote_class` puts Ray around it. It refuses work for any version but the
one it proved (invariant 8).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from actors.engine import Engine, EngineStats
from actors.torch_engine import TorchEngine
from tstar_ray.config import ActorsConfig, ModelConfig
from tstar_ray.decoding import Decoding
from tstar_ray.model import load_checkpoint, pick_device
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof


class WeightSource(Protocol):
    """How published weights are fetched; see cluster.weights."""

    def fetch(self, published: Any) -> torch.Tensor:
        """The flat buffer."""


@dataclass(frozen=True, slots=True)
class ActorInfo:
    """Where an actor runs, for logs and the run folder."""

    name: str
    """As shown on the Ray dashboard."""
    node: str
    """Host name."""
    pid: int
    """Process id."""
    proof: Proof
    """Weights it started with."""


class RolloutWorker:
    """One engine with its own copy of the model."""

    def __init__(
        self, index: int, model: ModelConfig, actors: ActorsConfig, *, threads: int, weights: WeightSource
    ) -> None:
        self._index, self._weights = index, weights
        torch.set_num_threads(threads)
        device, dtype = pick_device(gpus=actors.gpus, dtype=model.dtype)
        checkpoint = load_checkpoint(model.path, mask_token_id=model.mask_token_id, dtype=dtype, device=device)
        self._tokenizer = checkpoint.tokenizer
        self._engine: Engine = TorchEngine(
            checkpoint.model,
            max_batch=actors.max_batch,
            cache_gb=actors.cache_gb,
            cache_update=actors.cache_update,
        )

    def __repr__(self) -> str:
        return f"Rollout({self._index})"

    def ready(self) -> ActorInfo:
        """Answer once the model is loaded."""
        return ActorInfo(repr(self), platform.node(), os.getpid(), self._engine.proof)

    def load_weights(self, published: Any) -> Proof:
        """Fetch, load, drop caches, and prove what is now served."""
        return self._engine.load_weights(self._weights.fetch(published), published.version)

    def generate(self, requests: Sequence[Request], decoding: Decoding, version: int) -> list[tuple[Trajectory, str]]:
        """A trajectory and its text for each request, in order, decoded by exactly this weight version."""
        if version != self._engine.proof.version:
            raise RuntimeError(f"{self!r} serves weights {self._engine.proof.version}, asked to decode with {version}")
        trajectories = self._engine.generate(requests, decoding)
        texts = self._tokenizer.batch_decode(
            [t.completion_ids.tolist() for t in trajectories], skip_special_tokens=True
        )
        return list(zip(trajectories, texts))

    def stats(self) -> EngineStats:
        """Totals of the engine."""
        return self._engine.stats


def remote_class() -> Any:
    """`RolloutWorker` as a Ray actor class; Ray is imported here and nowhere else in this package."""
    import ray

    return ray.remote(RolloutWorker)
