"""What a collector is bound by, works on and brings back; see tstar_ray.collector."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from tstar_ray.data import PromptedProblem
from tstar_ray.decoding import Decoding, Variant
from tstar_ray.trajectory import Group, Request, Sample


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits, retries, and how much an actor gets."""

    rollout_s: float
    """One unit on a rollout actor."""
    reward_s: float
    """One sample on a reward actor; a chunk may take that for each sample in flight there when it is sent."""
    start_s: float
    """Added to the limit of a chunk, in which verifiers may have to start."""
    max_attempts: int
    """Tries of one sample."""
    in_flight: int = 1
    """An actor with so many samples in flight gets no further unit; 1: one unit at a time."""
    unit: int = 0
    """Most samples of a unit, at least one group; 0: a batch is one unit for each wanted actor."""
    scoring: int = 64
    """A reward actor with so many samples in flight gets no further chunk."""


@dataclass(slots=True)
class Collection:
    """What became of a batch."""

    groups: list[Group] = field(default_factory=list)
    """Complete ones, in the order asked."""
    failed: list[int] = field(default_factory=list)
    """Ids of groups that a sample ran out of attempts for."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Every verification, those without a reward too."""
    retries: int = 0
    """Samples asked for again."""
    rollout_s: float = 0.0
    """Seconds from dispatch until the last trajectory was there."""
    reward_s: float = 0.0
    """Seconds after that until the last verdict."""


@dataclass(slots=True)
class OpenGroup:
    """A group being collected."""

    problem: PromptedProblem
    size: int
    attempts_left: int
    samples: list[Sample] = field(default_factory=list)
    issued: int = 0


class Batch:
    """Groups dispatched together, decoded the same way."""

    def __init__(self, decoding: Decoding, variants: Sequence[Variant], group_size: int, rank: tuple[int, int]) -> None:
        """``rank``: batches of lower rank are served first."""
        self.decoding, self.variants, self.group_size, self.rank = decoding, variants, group_size, rank
        self.when_done: Callable[[Batch], None] = lambda batch: None
        """See `Collector.dispatch`."""
        self.order: list[int] = []
        """Ids of its groups."""
        self.found = Collection()
        """What there is, complete once `done`."""
        self._open: dict[int, OpenGroup] = {}
        self._complete: dict[int, Group] = {}
        self._units: deque[list[Request]] = deque()
        self._again: list[Request] = []
        self._began = self._rolled = time.monotonic()

    @property
    def done(self) -> bool:
        """Every group is complete or failed."""
        return not self._open

    @property
    def left(self) -> int:
        """Groups that are neither complete nor failed."""
        return len(self._open)

    def _close(self) -> None:
        self.found.groups = [self._complete[i] for i in self.order if i in self._complete]
        self.found.rollout_s = self._rolled - self._began
        self.found.reward_s = time.monotonic() - self._rolled


@dataclass(slots=True)
class Job:
    """A call in flight."""

    batch: Batch
    actor: str
    payload: list[Any]
    """Requests to decode, or (trajectory, text) pairs to score."""
    sent: float
    deadline: float


@dataclass(slots=True)
class Trouble:
    """Units that an actor failed at since it last delivered one."""

    count: int
    """Those in flight together count once: one fault of an engine fails all of them."""
    at: float
    groups: set[int]
    """In all of them: what may be to blame instead of the actor."""


def sample_seed(seed: int, group_id: int, sample: int) -> int:
    """Seed of one sample: 62 bits of a hash, so that no two samples of a run share a random stream."""
    digest = blake2b(f"{seed}/{group_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
