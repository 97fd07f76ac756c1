"""What a collector is bound by, and what it brings back; see tstar_ray.collector."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tstar_ray.trajectory import Group


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
