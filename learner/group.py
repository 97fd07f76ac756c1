"""The learner as a group of Ray actors, one DeepSpeed rank each.

    controller ──update(groups)──► every rank ──gradients between ranks──► report of rank 0
                ──publish(v)─────► every rank gathers, rank 0 stores the flat buffer

A process group cannot be healed: when a rank fails, the call raises `LearnerError`, and the group has to be
built anew from the last checkpoint. Every wait has a time limit.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tstar_ray.config import LearnerConfig, ModelConfig
from tstar_ray.trajectory import Group, Trajectory


class WeightSink(Protocol):
    """Where published weights go; see cluster.weights."""

    def publish(self, flat: Any, version: int) -> Any:
        """Store the flat buffer and describe it."""


class LearnerError(RuntimeError):
    """A rank failed or took too long."""


class LearnerRank:
    """One rank; heavy imports happen in `setup`, inside its own process."""

    def __init__(
        self,
        rank: int,
        model: ModelConfig,
        learner: LearnerConfig,
        *,
        threads: int,
        seed: int,
        weights: WeightSink,
    ) -> None:
        self._rank, self._model, self._learner = rank, model, learner
        self._threads, self._seed, self._weights = threads, seed, weights
        self._trainer: Any = None

    def __repr__(self) -> str:
        return f"Learner({self._rank})"

    def address(self) -> tuple[str, int]:
        """Host and a free port for the rendezvous; asked of rank 0."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def setup(self, world: int, host: str, port: int) -> str:
        """Load the model, join the process group and start DeepSpeed; returns where it runs."""
        import torch

        from learner.backend import join_process_group
        from learner.trainer import Trainer
        from tstar_ray.model import load_checkpoint, pick_device

        torch.set_num_threads(self._threads)
        torch.manual_seed(self._seed)
        device, dtype = pick_device(gpus=self._learner.gpus, dtype=self._model.dtype)
        checkpoint = load_checkpoint(
            self._model.path, mask_token_id=self._model.mask_token_id, dtype=dtype, device=device
        )
        join_process_group(
            rank=self._rank,
            world=world,
            host=host,
            port=port,
            device=device,
            timeout_s=self._learner.timeout_s,
        )
        self._trainer = Trainer(checkpoint, self._learner, seed=self._seed)
        return f"{self!r} on {platform.node()} pid {os.getpid()}"

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the trainer; only rank 0 returns its result."""
        result = getattr(self._trainer, method)(*args, **kwargs)
        return result if self._rank == 0 else None

    def publish(self, version: int) -> Any:
        """Gather the weights; rank 0 stores them and describes what it stored."""
        flat = self._trainer.flat_weights()
        return self._weights.publish(flat, version) if self._rank == 0 else None


class LearnerGroup:
    """Driver-side handle of all ranks. ``wait`` is `ray.get` with errors turned into `LearnerError`."""

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        *,
        options: dict[str, Any],
        threads: int,
        seed: int,
        weights: WeightSink,
        name: Callable[[str], str],
    ) -> None:
        """``options`` are Ray's for one rank; ``name`` makes a unique actor name of a readable one."""
        import ray

        self._timeout_s = learner.timeout_s
        actor: Any = ray.remote(LearnerRank)
        self.ranks: list[Any] = [
            actor.options(name=name(f"learner-{rank}"), **options).remote(
                rank, model, learner, threads=threads, seed=seed, weights=weights
            )
            for rank in range(learner.ranks)
        ]

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Begin the rendezvous; returns a ref for each rank that resolves once it trains."""
        host, port = self._wait([self.ranks[0].address.remote()], timeout_s, "rendezvous address")[0]
        return {f"learner-{i}": rank.setup.remote(len(self.ranks), host, port) for i, rank in enumerate(self.ranks)}

    def update(self, groups: Sequence[Group], spec: Any, *, update: int) -> Any:
        """One TraceRL update on complete groups; returns an `UpdateReport`."""
        import ray

        return self._call("update", ray.put(groups), spec, update=update)

    def replay_error(self, trajectories: Sequence[Trajectory]) -> float:
        """See `Trainer.replay_error`."""
        return self._call("replay_error", trajectories)

    def publish(self, version: int) -> Any:
        """Store the current weights as ``version``; returns their description."""
        return self._wait([r.publish.remote(version) for r in self.ranks], self._timeout_s, "publish")[0]

    def save(self, folder: Path) -> None:
        """Write the state that `load` continues from."""
        self._call("save", folder)

    def load(self, folder: Path) -> None:
        """Continue from `save`."""
        self._call("load", folder)

    def start_stage(self, *, reset_optimizer: bool) -> None:
        """See `Trainer.start_stage`."""
        self._call("start_stage", reset_optimizer=reset_optimizer)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint."""
        self._call("export", folder)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        refs = [rank.call.remote(method, *args, **kwargs) for rank in self.ranks]
        return self._wait(refs, self._timeout_s, method)[0]

    def _wait(self, refs: list[Any], timeout_s: float, what: str) -> list[Any]:
        """Results of all ranks. The first failure counts: the other ranks then only wait for the lost one."""
        import ray

        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, timeout=timeout_s)
            if not done:
                raise LearnerError(f"learner: {what} took longer than {timeout_s:g} s (learner.timeout_s)")
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise LearnerError(f"learner: {what} failed: {cause}") from error
        return ray.get(refs)

    def stop(self) -> None:
        """End the ranks."""
        import ray

        for rank in self.ranks:
            ray.kill(rank)
