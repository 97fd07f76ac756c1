"""The learner as a group of Ray actors, one DeepSpeed rank each.

    controller ──update(groups)──► every rank ──gradients between ranks──► report of rank 0
                ──publish(v)─────► every rank gathers, rank 0 stores the flat buffer

A process group cannot be healed: when a rank is lost, the call raises `LearnerLostError`, and so does `check`, for
whoever waits for something else meanwhile. `restart` then builds the group anew, to continue from the last checkpoint.
An error of the update itself is a `LearnerError`. Every wait has a time limit, and goes through `LearnerGroup.wait`, so
that others' work can go on meanwhile.
"""

from __future__ import annotations

import os
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
_OTHERS = "the wait for others"
_ROOM_S = 3600.0
"""Ranks that are built anew wait so long for room, as after the loss of a node that is being replaced."""


class WeightSink(Protocol):
    """Where published weights go; see cluster.weights."""

    def publish(self, flat: Any, version: int) -> Any:
        """Store the flat buffer and describe it."""


class LearnerError(RuntimeError):
    """A call failed."""


class LearnerLostError(LearnerError):
    """A rank died or does not answer."""


class _LateError(LearnerLostError):
    """Out of time."""


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
        self._port = socket.socket()  # of the rendezvous, held until it begins

    def __repr__(self) -> str:
        return f"Learner({self._rank})"

    def alive(self) -> None:
        """A sign of life, given by a thread of its own."""

    def address(self) -> tuple[str, int]:
        """Host and a free port for the rendezvous; asked of rank 0."""
        import ray

        self._port.bind(("", 0))
        return ray.util.get_node_ip_address(), self._port.getsockname()[1]

    def setup(self, world: int, host: str, port: int) -> Place:
        """Load the model, join the process group and start DeepSpeed; returns where it runs."""
        if self._learner.gpus:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # micro-batches differ in size
        import torch

        from learner.backend import join_process_group
        from tstar_ray.model import pick_device

        torch.set_num_threads(self._threads)
        torch.manual_seed(self._seed)
        device, dtype = pick_device(gpus=self._learner.gpus, dtype=self._model.dtype)
        checkpoint = self._load(dtype=dtype, device=device)
        self._port.close()
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
    """Driver-side handle of all ranks."""

    room_settings = "learner.cpus, learner.gpus, learner.labels"
    """What decides where a rank finds room."""

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

        from cluster.placement import Together, amounts

        self._timeout_s, self._silent_s = learner.timeout_s, learner.silent_s
        self._count = learner.ranks
        ray.method(concurrency_group="health")(rank_class.alive)
        health: Any = {"concurrency_groups": {"health": 1}}
        actor: Any = ray.remote(**health)(rank_class)

        def make(rank: int, name: str) -> Any:
            return actor.options(name=name, **self._room.options(rank)).remote(
                rank, model, learner, threads=threads, seed=seed, weights=weights
            )

        self._make, self._reserve = make, lambda: Together(self._count, options)
        self._asked = amounts({"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0)})
        self.wait: Callable[..., tuple[list[Any], list[Any]]] = ray.wait
        """(refs, timeout=seconds) -> (done, pending)."""
        self.on_event: Callable[[str], None] = lambda text: None
        """Is told of a wait for room."""
        self.places: dict[str, Place] = {}
        """Where the ranks run; empty until all have started."""
        self.restarts = 0
        """Times the group was built anew."""
        self.ranks: list[Any] = []
        self._make_ranks()

    def _make_ranks(self) -> None:
        suffix = f"-r{self.restarts}" if self.restarts else ""
        self._signs: dict[int, tuple[Any, float]] = {}
        self._looked, self._doing = time.monotonic(), _OTHERS
        self.places = {}
        self._room = self._reserve()
        self.ranks = [self._make(rank, f"learner-{rank}{suffix}") for rank in range(self._count)]

    def start(self, timeout_s: float, *, room_s: float = 0.0) -> dict[str, Any]:
        """Begin the rendezvous; returns a ref for each rank that resolves to its `Place` once it trains. Raises
        LearnerError where the ranks find no room within the longer of both limits."""
        self._find_room(timeout_s, room_s)
        host, port = self._wait([self.ranks[0].address.remote()], timeout_s, "rendezvous address")[0]
        return {f"learner-{i}": rank.setup.remote(len(self.ranks), host, port) for i, rank in enumerate(self.ranks)}

    def _find_room(self, timeout_s: float, room_s: float) -> None:
        """Wait until every rank has a process, and say every ``timeout_s`` seconds what is missing."""
        import ray

        from cluster.placement import amounts

        refs, began = [rank.alive.remote() for rank in self.ranks], time.monotonic()
        while True:
            try:
                self._wait(refs, timeout_s, "start")
                return
            except _LateError as error:
                waited = time.monotonic() - began
                missing = (
                    f"learner ranks are not placed after {waited:.0f} s: {len(refs)} are asked for with "
                    f"{self._asked} each ({self.room_settings}), the cluster has {amounts(ray.cluster_resources())}, "
                    f"free {amounts(ray.available_resources())}; add nodes, or ask for less"
                )
                if waited >= room_s:
                    raise LearnerError(f"{missing}, or raise cluster.start_timeout_s") from error
                self.on_event(f"{missing}; waiting on, at most {room_s / 60:.0f} minutes")

    def restart(self, timeout_s: float) -> None:
        """Build all ranks anew, from the start model. They wait for room up to an hour, as long as a node may take to
        be replaced; once they have it, LearnerLostError is raised where the start takes too long or fails."""
        self.stop()
        self.restarts += 1
        self._make_ranks()
        refs = self.start(timeout_s, room_s=_ROOM_S)
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
        self._doing = what
        try:
            while pending:
                left = deadline - time.monotonic()
                done, pending = self.wait(pending, timeout=max(0.0, min(left, self._silent_s / 4)))
                if done:
                    self._look_at(done, what)
                elif left <= 0:
                    raise _LateError(f"learner: {what} took longer than {timeout_s:g} s")
                else:
                    self.check()
        finally:
            self._doing = _OTHERS
        return ray.get(refs)

    def _look_at(self, done: list[Any], what: str) -> None:
        import ray

        try:
            ray.get(done)
        except (ray.exceptions.RayTaskError, ray.exceptions.UnserializableException) as error:
            cause = getattr(error, "cause", None) or error
            told = f"{type(cause).__name__}: {cause}"
            if len(self.ranks) > 1 and any(sign in told for sign in _COLLECTIVE):
                # A collective notices a lost neighbour seconds before Ray does, and its group is of no more use.
                raise LearnerLostError(f"learner: a rank was lost during {what}: {cause}") from error
            raise LearnerError(f"learner: {what} failed: {cause}") from error
        except ray.exceptions.RayError as error:  # its process or node died, or was ended for want of memory
            raise LearnerLostError(f"learner: {what} failed: {error}") from error

    def check(self) -> None:
        """Look for signs of life, and ask for the next; never waits. Raises LearnerLostError for a rank that died or,
        once all have started, is silent; how long a start may take is up to the caller's own limit."""
        import ray

        now = time.monotonic()
        # Time in which nobody looked, as when the driver was stopped, is nobody's silence.
        away = max(0.0, now - self._looked - self._silent_s / 4)
        self._looked = now
        for index, rank in enumerate(self.ranks):
            ref, sent = self._signs.get(index, (None, now))
            if ref is not None and ray.wait([ref], timeout=0)[0]:
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    raise LearnerLostError(f"learner: rank {index} was lost during {self._doing}: {error}") from error
                ref = None
            self._signs[index] = (rank.alive.remote(), now) if ref is None else (ref, sent + away)
            silent = now - self._signs[index][1]
            if self.places and silent > self._silent_s:
                raise LearnerLostError(
                    f"learner: rank {index} gave no sign of life in {silent:.0f} s during {self._doing}"
                )

    def stop(self) -> None:
        """End the ranks."""
        import ray

        for rank in self.ranks:
            ray.kill(rank)
        self._room.free()
        self.ranks = []
