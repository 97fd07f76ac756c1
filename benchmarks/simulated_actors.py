"""Rollout actors and a learner rank that take a configured time instead of computing.

A completion of L tokens takes L x `Times.token_s` in one of an actor's slots, an update `Times.update_s`. Lengths are
log-normal up to the decoding's limit, drawn from each sample's own seed, so that every configuration decodes the same
work.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.engine import CancelledError
from cluster.weights import ObjectStoreTransport
from learner.report import Sums, UpdateReport
from tstar_ray.decoding import Decoding
from tstar_ray.place import Place, here
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import Proof, checksum


@dataclass(frozen=True, slots=True)
class Times:
    """What the simulated parts take."""

    token_s: float = 0.01
    """One token of one sequence on an actor."""
    median_tokens: float = 300.0
    """Of completions."""
    sigma: float = 0.6
    """Spread of the logarithm of completion lengths."""
    slots: int = 32
    """Sequences an actor decodes at once."""
    load_s: float = 0.05
    """Loading weights; what is decoded waits."""
    update_s: float = 1.0
    """One update of the learner."""
    parameters: int = 1_000_000
    """Of the weights that are published, fp32."""


def completion_tokens(seed: int, times: Times, decoding: Decoding) -> int:
    """Length of a completion in whole blocks, cut at ``max_new_tokens``; the same for a seed wherever it is decoded."""
    tokens = np.random.default_rng(seed).lognormal(np.log(times.median_tokens), times.sigma)
    block = decoding.block_size
    return max(1, round(min(tokens, decoding.max_new_tokens) / block)) * block


class SimulatedRollout:
    """Methods of `actors.rollout.RolloutWorker`; sequences take the first free slot, in order of arrival."""

    def __init__(self, index: int, times: Times) -> None:
        self._index, self._times = index, times
        self._proof = Proof(0, "")
        self._turn = threading.Condition()
        self._free = [0.0] * times.slots
        self._loads: list[tuple[float, int]] = [(0.0, 0)]
        self._cancelled: set[int] = set()

    def __repr__(self) -> str:
        return f"Rollout({self._index})"

    def ready(self) -> Place:
        """There is nothing to load."""
        return here(repr(self))

    def progress(self) -> int:
        """Always moving on."""
        return time.monotonic_ns()

    def load_weights(self, published: Any) -> Proof:
        """Fetch and check as a real actor does; every slot waits for `load_s`."""
        flat = ObjectStoreTransport().fetch(published)
        time.sleep(self._times.load_s)
        with self._turn:
            self._free = [at + self._times.load_s for at in self._free]
            self._loads.append((time.monotonic(), published.version))
        self._proof = Proof(published.version, checksum(flat))
        return self._proof

    def cancel(self, group_ids: Collection[int]) -> None:
        """Calls that wait for these groups fail."""
        with self._turn:
            self._cancelled |= set(group_ids)
            self._turn.notify_all()

    def generate(self, requests: Sequence[Request], decoding: Decoding, version: int) -> list[tuple[Trajectory, str]]:
        """Wait as long as decoding would take."""
        assert self._proof.version >= version
        spans = []
        with self._turn:
            for request in requests:
                start = max(time.monotonic(), heapq.heappop(self._free))
                tokens = completion_tokens(request.seed, self._times, decoding)
                end = start + tokens * self._times.token_s
                heapq.heappush(self._free, end)
                spans.append((request, tokens, start))
            done = max(start + tokens * self._times.token_s for _, tokens, start in spans)
            while (left := done - time.monotonic()) > 0:
                self._turn.wait(timeout=left)
                if self._cancelled & {r.group_id for r in requests}:
                    raise CancelledError("its group was cancelled")
            return [self._trajectory(request, tokens, start, decoding) for request, tokens, start in spans]

    def _trajectory(self, request: Request, tokens: int, start: float, decoding: Decoding) -> tuple[Trajectory, str]:
        block, prompt = decoding.block_size, len(request.prompt_ids)
        blocks = tokens // block
        began = start + np.arange(blocks) * block * self._times.token_s
        times, versions = (np.array(column) for column in zip(*self._loads))
        trajectory = Trajectory(
            group_id=request.group_id,
            sample=request.sample,
            token_ids=np.concatenate([request.prompt_ids, np.full(tokens, 5)]).astype(np.int32),
            prompt_len=prompt,
            completion_len=tokens,
            step_map=np.arange(1, tokens + 1, dtype=np.int32),
            logprobs=np.zeros(tokens, dtype=np.float32),
            block_size=block,
            temperature=decoding.temperature,
            weight_versions=versions[np.searchsorted(times, began, side="right") - 1].astype(np.int64),
            stop_reason="length" if tokens >= decoding.max_new_tokens else "stop",
        )
        return trajectory, ("right", "wrong")[request.seed % 2]


class SimulatedRank:
    """Methods of `learner.group.LearnerRank`."""

    def __init__(self, rank: int, model: Any, learner: Any, *, threads: int, seed: int, weights: Any) -> None:
        self._rank, self._times, self._weights, self._updates = rank, model, weights, 0

    def alive(self) -> None:
        """A sign of life."""

    def address(self) -> tuple[str, int]:
        """There is no rendezvous."""
        return "", 0

    def setup(self, world: int, host: str, port: int) -> Place:
        """Nothing to build."""
        return here(f"Learner({self._rank})")

    def publish(self, version: int) -> Any:
        """A buffer of the configured size, different in every version."""
        return self._weights.publish(torch.full((self._times.parameters,), float(version)), version)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Take the time of an update, keep a step count, and answer like a trainer."""
        return getattr(self, f"_{method}")(*args, **kwargs)

    def _update(self, groups: Sequence[Any], spec: Any, *, update: int) -> UpdateReport:
        time.sleep(self._times.update_s)
        self._updates += 1
        samples = sum(len(group.samples) for group in groups)
        return Sums().report(
            lr=0.0,
            grad_norm=0.0,
            steps=1,
            samples=samples,
            seconds=self._times.update_s,
            comparable=False,
            has_value=False,
        )

    def _replay_error(self, trajectories: Sequence[Trajectory]) -> float:
        return 0.0

    def _start_stage(self, *, reset_optimizer: bool) -> None:
        pass

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "updates").write_text(str(self._updates))

    def _load(self, folder: Path) -> None:
        self._updates = int((folder / "updates").read_text())

    def _export(self, folder: Path) -> None:
        self._save(folder)
