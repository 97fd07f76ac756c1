"""Actors of one role under supervision: proven before they work, replaced when lost, more or fewer on demand.

    wanted ──► starting ──ready──► proving ──proof──► live ◄──probe──┐
                  ▲                   ▲                │ └───────────┘
                  │ back-off          └── new weights ─┤
                  └────────── lost ◄───────────────────┘  died, silent, no progress, wrong weights, late

- **Nothing here waits.** The owner waits on `refs` together with its own calls, hands over each that is done
  (`take`) and lets time pass (`tick`); the clock is injectable.
- **Only proven weights serve** (invariant 8). After `serve` an actor gets no new work before it answered with the
  version and checksum that were published; one that starts meanwhile proves the newest. What it decodes already
  goes on: engines take weights between two steps.
- **Lost** is an actor that died, left several probes unanswered, holds work without moving on, proves other
  weights, or takes too long to prove. It is killed for good, and another is made under a new name, so that a late
  answer of the old one can never be taken for the new one's. The second and further losses in a row of one place
  wait longer each time. Losses are counted against one budget for the pool and hour; past it the run ends.
- **Elastic.** `resize` makes or drains actors. One that the cluster has no room for stays pending, which is the
  demand that Ray's autoscaler sees; only a pool without any actor that works is an error, after ``start_s``.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import ray

from cluster.placement import amounts, first_line
from cluster.session import ClusterError
from cluster.weights import Published
from tstar_ray.place import Place

_HOUR_S, _STABLE_S, _LONGEST_BACKOFF_S = 3600.0, 60.0, 60.0


@dataclass(frozen=True, slots=True)
class Supervision:
    """When an actor counts as lost, and what follows."""

    start_s: float
    """Seconds an actor may take to prove weights; and a pool may be without any actor that works."""
    probe_s: float
    """Seconds between probes, and within which one has to be answered."""
    probe_failures: int
    """Probes in a row that an actor may leave unanswered before it is lost."""
    stall_s: float
    """Seconds an actor may hold work without any progress."""
    max_restarts: int
    """Replacements within an hour, for each wanted actor."""
    backoff_s: float = 1.0
    """Seconds before the second replacement in a row; they double from then on, up to a minute."""


@dataclass(slots=True)
class _Member:
    """One place of the pool and the actor that holds it."""

    index: int
    name: str
    handle: Any = None
    place: Place | None = None
    state: Literal["waiting", "starting", "proving", "live"] = "waiting"
    since: float = 0.0
    """When it took its state; ``waiting``: when it may start."""
    ref: Any = None
    """What it was asked for: to be ready, to prove weights."""
    probe: Any = None
    """An unanswered probe."""
    probed: float = 0.0
    """When that was sent, or the last one answered."""
    progress: int = -1
    """What the last probe said."""
    moved: float = 0.0
    """When progress or idleness was last seen."""
    losses: int = 0
    """In a row."""
    announced: bool = False
    """Whether its owner was told that it stays pending."""
    draining: bool = False
    """Gets no more work, and ends once it has none."""


class ActorPool:
    """Actors with methods ``ready() -> Place`` and ``progress() -> int``, and, for a pool that serves weights,
    ``load_weights(published) -> Proof``."""

    def __init__(
        self,
        role: str,
        create: Callable[[int, str], Any],
        *,
        count: int,
        supervision: Supervision,
        serves_weights: bool,
        on_event: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``create(index, name)`` makes actor number ``index``; ``on_event`` is told of losses and what follows."""
        self._role, self._create, self._rules = role, create, supervision
        self._serves_weights, self._on_event, self._clock = serves_weights, on_event, clock
        self._published: Published | None = None
        self._members: list[_Member] = []
        self._made: Counter[int] = Counter()
        self._recent: deque[float] = deque()
        self._worked = self._ticked = clock()
        self.count = 0
        """Actors wanted."""
        self.restarts = 0
        """Actors lost so far."""
        self.resize(count)

    @property
    def handles(self) -> dict[str, Any]:
        """Actors that may get work, by name."""
        return {m.name: m.handle for m in self._members if m.state == "live" and not m.draining}

    @property
    def coming(self) -> int:
        """Actors wanted that may not work yet: waiting to start, starting, or proving weights."""
        return sum(m.state != "live" and not m.draining for m in self._members)

    @property
    def all_handles(self) -> dict[str, Any]:
        """Actors whose answers count, by name, also those that get no new work now."""
        return {m.name: m.handle for m in self._members if m.handle is not None}

    @property
    def names(self) -> set[str]:
        """Of `all_handles`."""
        return set(self.all_handles)

    @property
    def places(self) -> dict[str, Place]:
        """Where the actors run that have answered."""
        return {m.name: m.place for m in self._members if m.place}

    @property
    def starting(self) -> dict[str, Any]:
        """Refs of actors that are not ready yet."""
        return {m.name: m.ref for m in self._members if m.state == "starting"}

    @property
    def proving(self) -> bool:
        """Some ready actor does not serve the newest weights yet."""
        return any(m.state == "proving" for m in self._members)

    @property
    def refs(self) -> list[Any]:
        """What to wait on."""
        return [ref for m in self._members for ref in (m.ref, m.probe) if ref is not None]

    def serve(self, published: Published) -> None:
        """Ask every ready actor to load these weights; each is back at work once it proved them."""
        self._published = published
        for member in self._members:
            if member.state in ("live", "proving"):
                self._prove(member)

    def forget_weights(self) -> None:
        """Those published last cannot be had any more: actors that have not proved them wait for the next."""
        self._published = None
        for member in self._members:
            if member.state == "proving":
                member.ref = None

    def take(self, ref: Any) -> bool:
        """Handle one of `refs` that is done; False if it is none of them."""
        for member in self._members:
            if ref is not None and ref in (member.ref, member.probe):
                self._answered(member, ref)
                return True
        return False

    def _answered(self, member: _Member, ref: Any) -> None:
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            if isinstance(getattr(error, "cause", error), ray.exceptions.ObjectLostError):
                # The process that owned the weights died. That is not this actor's fault: it is asked again, within
                # the limit for a proof; a learner that is built anew publishes others.
                member.ref = None
            else:
                self._lose(member, first_line(error))
            return
        now = self._clock()
        if ref is member.probe:
            member.probe, member.probed = None, now
            if answer != member.progress:
                member.progress, member.moved = answer, now
            return
        member.ref = None
        if member.state == "starting":
            member.place, member.announced = answer, False
            member.probed = member.moved = now
            if self._serves_weights:
                self._prove(member)
            else:
                member.state, member.since = "live", now
        elif self._published and answer != self._published.proof:
            self._lose(member, f"serves {answer}, published is {self._published.proof}")
        else:
            member.state, member.since = "live", now

    def _prove(self, member: _Member) -> None:
        member.state, member.since, member.ref = "proving", self._clock(), None
        self._ask_for_proof(member)

    def _ask_for_proof(self, member: _Member) -> None:
        if self._published:  # otherwise it waits for the first to be published
            member.ref = member.handle.load_weights.remote(self._published)

    def tick(self, busy: Collection[str] = ()) -> None:
        """Let time pass: start, probe, and give up what is silent. ``busy``: names of actors that hold work."""
        now, rules = self._clock(), self._rules
        # Time in which the owner did not look is nobody's silence.
        away = max(0.0, now - self._ticked - rules.probe_s)
        self._ticked, self._worked = now, self._worked + away
        for member in list(self._members):
            member.since, member.probed, member.moved = (t + away for t in (member.since, member.probed, member.moved))
            if member.state == "waiting":
                if now >= member.since:
                    self._start(member)
                continue
            if member.state == "starting":
                if now - member.since > rules.start_s and not member.announced:
                    member.announced = True
                    self._on_event(f"{member.name} is not ready after {rules.start_s:g} s: {self._shortage()}")
                continue
            if member.name not in busy:
                member.moved = now
            if member.state == "proving" and member.ref is None:
                self._ask_for_proof(member)
            if member.state == "proving" and member.ref is not None and now - member.since > rules.start_s:
                self._lose(member, f"no proof of its weights in {rules.start_s:g} s")
            elif member.probe is not None and now - member.probed > rules.probe_s * rules.probe_failures:
                self._lose(member, f"no answer to a probe in {now - member.probed:.0f} s")
            elif now - member.moved > rules.stall_s:
                self._lose(member, f"no progress in {now - member.moved:.0f} s")
            elif member.probe is None and now - member.probed >= rules.probe_s:
                member.probe, member.probed = member.handle.progress.remote(), now
        for member in [m for m in self._members if m.draining and m.name not in busy]:
            self._members.remove(member)
            self._kill(member)
        if any(m.state in ("live", "proving") for m in self._members):
            self._worked = now
        elif now - self._worked > rules.start_s:
            raise ClusterError(f"no {self._role} actor is ready after {rules.start_s:g} s: {self._shortage()}")

    def lost(self, name: str, reason: str) -> None:
        """Replace an actor that a call found dead or late; one that was replaced already is left alone."""
        for member in self._members:
            if member.name == name and member.handle is not None:
                self._lose(member, reason)

    def _lose(self, member: _Member, reason: str) -> None:
        now, name = self._clock(), member.name
        if member.state in ("live", "proving"):
            self._worked = now
            if now - member.since > _STABLE_S:
                member.losses = 0
        member.losses += 1
        self._kill(member)
        if member.draining:
            self._members.remove(member)
            return
        self.restarts += 1
        self._recent.append(now)
        while now - self._recent[0] > _HOUR_S:
            self._recent.popleft()
        budget = self._rules.max_restarts * max(1, self.count)
        if len(self._recent) > budget:
            raise ClusterError(
                f"{name} was lost ({reason}), and the {self._role} actors' {budget} restarts an hour are used up "
                "(actors.max_restarts for each actor)"
            )
        pause = self._rules.backoff_s * 2.0 ** (member.losses - 2) if member.losses > 1 else 0.0
        member.state, member.since = "waiting", now + min(pause, _LONGEST_BACKOFF_S)
        member.name = self._name(member.index)
        self._on_event(
            f"{name} was lost ({reason}); {member.name} takes its place" + (f" in {pause:g} s" * (pause > 0))
        )
        if not pause:
            self._start(member)

    def _start(self, member: _Member) -> None:
        member.handle = self._create(member.index, member.name)
        member.state, member.since, member.ref = "starting", self._clock(), member.handle.ready.remote()

    def _kill(self, member: _Member) -> None:
        if member.handle is not None:
            ray.kill(member.handle)
        member.handle = member.place = member.ref = member.probe = None
        member.progress = -1

    def resize(self, count: int) -> None:
        """Want ``count`` actors: new ones start, surplus ones (those that do not work yet first) get no more work
        and end once they have none."""
        self.count = count
        kept = [m for m in self._members if not m.draining]
        for member in sorted(kept, key=lambda m: (m.state in ("live", "proving"), -m.index))[
            : max(0, len(kept) - count)
        ]:
            if member.state in ("live", "proving"):
                member.draining = True
            else:
                self._members.remove(member)
                self._kill(member)
        used = {m.index for m in self._members}
        free = (i for i in range(len(used) + count) if i not in used)
        for _ in range(count - len(kept)):
            index = next(free)
            member = _Member(index, self._name(index))
            self._members.append(member)
            self._start(member)

    def _name(self, index: int) -> str:
        """A name that no actor had before; Ray frees the old ones only a moment after their end."""
        made, self._made[index] = self._made[index], self._made[index] + 1
        return f"{self._role}-{index}" + (f"-r{made}" if made else "")

    def _shortage(self) -> str:
        return (
            f"the cluster has {amounts(ray.cluster_resources())}, free {amounts(ray.available_resources())}; add "
            "nodes, lower what the actors ask for, or raise cluster.start_timeout_s"
        )

    def stop(self) -> None:
        """Kill all."""
        for member in self._members:
            self._kill(member)
        self._members.clear()
