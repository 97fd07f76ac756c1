"""The learner as a group of Ray actors, one DeepSpeed rank each.

    controller ──update(groups)──► every rank ──gradients between ranks──► report of rank 0
                ──publish(v)─────► every rank gathers, rank 0 stores the flat buffer

A process group cannot be healed: when a rank is lost, the call raises `LearnerLostError`, and `restart` builds the
group anew, to continue from the last checkpoint. An error of the update itself is a `LearnerError`. Every wait has a
time limit, and goes through `LearnerGroup.wait`, so that others' work can go on meanwhile.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tstar_ray.config import LearnerConfig, ModelConfig
from tstar_ray.place import Place, here
from tstar_ray.trajectory import Group, Trajectory

_COLLECTIVE = ("gloo", "NCCL", "DistBackendError", "Connection reset by peer", "Connection closed by peer")
"""Signs of a collective that failed, in the text of an error."""


class WeightSink(Protocol):
    """Where published weights go; see cluster.weights."""

    def publish(self, flat: Any, version: int) -> Any:
        """Store the flat buffer and describe it."""


class LearnerError(RuntimeError):
    """A call failed."""


class LearnerLostError(LearnerError):
    """A rank died or does not answer."""


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
        self._flat: Any = None  # the buffer of publishes, filled anew by each

    def __repr__(self) -> str:
        return f"Learner({self._rank})"

    def alive(self) -> None:
        """A sign of life, given by a thread of its own."""

    def address(self) -> tuple[str, int]:
        """Host and a free port for the rendezvous; asked of rank 0."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def setup(self, world: int, host: str, port: int) -> Place:
        """Load the model, join the process group and start DeepSpeed; returns where it runs."""
        import torch

        from learner.backend import join_process_group
        from tstar_ray.model import pick_device

        torch.set_num_threads(self._threads)
        torch.manual_seed(self._seed)
        device, dtype = pick_device(gpus=self._learner.gpus, dtype=self._model.dtype)
        checkpoint = self._load(dtype=dtype, device=device)
        join_process_group(
            rank=self._rank,
            world=world,
            host=host,
            port=port,
            device=device,
            timeout_s=self._learner.timeout_s,
        )
        self._trainer = self._make_trainer(checkpoint)
        return here(repr(self))

    def _load(self, *, dtype: Any, device: Any) -> Any:
        from tstar_ray.model import load_checkpoint

        return load_checkpoint(self._model.path, mask_token_id=self._model.mask_token_id, dtype=dtype, device=device)

    def _make_trainer(self, checkpoint: Any) -> Any:
        from learner.trainer import Trainer

        return Trainer(checkpoint, self._learner, seed=self._seed)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the trainer; only rank 0 returns its result."""
        result = getattr(self._trainer, method)(*args, **kwargs)
        return result if self._rank == 0 else None

    def publish(self, version: int) -> Any:
        """Gather the weights; rank 0 alone copies them to a buffer, stores it and describes what it stored."""
        if self._rank:
            return self._trainer.gather_weights()
        self._flat = self._trainer.flat_weights(self._flat)
        return self._weights.publish(self._flat, version)


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
        rank_class: Any = LearnerRank,
    ) -> None:
        """``options`` are Ray's for one rank; ``rank_class`` has the methods of `LearnerRank`."""
        import ray

        self._timeout_s, self._silent_s = learner.timeout_s, learner.silent_s
        self._count = learner.ranks
        ray.method(concurrency_group="health")(rank_class.alive)
        health: Any = {"concurrency_groups": {"health": 1}}
        actor: Any = ray.remote(**health)(rank_class)

        def make(rank: int, name: str) -> Any:
            return actor.options(name=name, **options).remote(
                rank, model, learner, threads=threads, seed=seed, weights=weights
            )

        self._make = make
        self.wait: Callable[..., tuple[list[Any], list[Any]]] = ray.wait
        """(refs, timeout=seconds) -> (done, pending)."""
        self.places: dict[str, Place] = {}
        """Where the ranks run; empty until all have started."""
        self.restarts = 0
        """Times the group was built anew."""
        self.ranks: list[Any] = []
        self._make_ranks()

    def _make_ranks(self) -> None:
        suffix = f"-r{self.restarts}" if self.restarts else ""
        self._signs: dict[int, tuple[Any, float]] = {}
        self.places = {}
        self.ranks = [self._make(rank, f"learner-{rank}{suffix}") for rank in range(self._count)]

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Begin the rendezvous; returns a ref for each rank that resolves to its `Place` once it trains."""
        host, port = self._wait([self.ranks[0].address.remote()], timeout_s, "rendezvous address")[0]
        return {f"learner-{i}": rank.setup.remote(len(self.ranks), host, port) for i, rank in enumerate(self.ranks)}

    def restart(self, timeout_s: float) -> None:
        """Build all ranks anew, from the start model; raises LearnerLostError where that takes too long or fails."""
        self.stop()
        self.restarts += 1
        self._make_ranks()
        refs = self.start(timeout_s)
        self.places = dict(zip(refs, self._wait(list(refs.values()), timeout_s, "start")))

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

        pending, deadline = list(refs), time.monotonic() + timeout_s
        while pending:
            left = deadline - time.monotonic()
            done, pending = self.wait(pending, timeout=max(0.0, min(left, self._silent_s / 4)))
            if not done:
                if left <= 0:
                    raise LearnerLostError(f"learner: {what} took longer than {timeout_s:g} s")
                self._probe(what)
                continue
            try:
                ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise LearnerLostError(f"learner: {what} failed: {error}") from error
            except ray.exceptions.RayTaskError as error:
                told = f"{type(error.cause).__name__}: {error.cause}"
                if len(self.ranks) > 1 and any(sign in told for sign in _COLLECTIVE):
                    # A collective notices a lost neighbour seconds before Ray does, and its group is of no more use.
                    raise LearnerLostError(f"learner: a rank was lost during {what}: {error.cause}") from error
                raise LearnerError(f"learner: {what} failed: {error.cause}") from error
        return ray.get(refs)

    def _probe(self, what: str) -> None:
        """Look for signs of life, and ask for the next. Raises LearnerLostError for a rank that died or, once all have
        started, is silent; how long a start may take is up to the caller's own limit."""
        import ray

        now = time.monotonic()
        for index, rank in enumerate(self.ranks):
            ref, sent = self._signs.get(index, (None, now))
            if ref is not None and ray.wait([ref], timeout=0)[0]:
                try:
                    ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    raise LearnerLostError(f"learner: rank {index} was lost during {what}: {error}") from error
                ref = None
            if ref is None:
                self._signs[index] = rank.alive.remote(), now
            elif self.places and now - sent > self._silent_s:
                raise LearnerLostError(
                    f"learner: rank {index} gave no sign of life in {now - sent:.0f} s during {what}"
                )

    def stop(self) -> None:
        """End the ranks."""
        import ray

        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
