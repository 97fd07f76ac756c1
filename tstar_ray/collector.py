"""From problems to complete, rewarded groups: the synchronous half of the loop that an asynchronous one replaces.

    problems ──► units of requests ──► idle rollout actors ──► reward actors ──► groups
                     ▲                       │ lost                │ no reward
                     └──── reissued ─────────┴──── replaced ───────┘

- A unit whose actor died, hung or served other weights is reissued; the actor is replaced, and the new one
  proves the current weights before it gets work (invariant 8).
- A sample that could not be scored (verifier timed out, crashed or rejected it) earns nothing: a new sample
  with its own seed takes its place (invariant 7). Past ``max_attempts`` its group counts as failed.
- Every wait has a time limit; nothing is dropped for being slow.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import ray

from cluster.placement import wait_ready
from cluster.pool import ActorPool
from cluster.session import ClusterError
from cluster.weights import ObjectStoreTransport, Published
from tstar_ray.data import PromptedProblem
from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Group, Request, Sample, Trajectory


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits and retries."""

    rollout_s: float
    """One unit on a rollout actor."""
    reward_s: float
    """One sample on a reward actor, from when its unit was sent, for a whole unit of n samples n times that."""
    start_s: float
    """A replaced actor until it is ready and proved its weights."""
    max_attempts: int
    """Tries of one sample."""


@dataclass(slots=True)
class Collection:
    """What one call collected."""

    groups: list[Group] = field(default_factory=list)
    """Complete ones, in the order asked."""
    failed: list[int] = field(default_factory=list)
    """Ids of groups that a sample ran out of attempts for."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Every verification, those without a reward too."""
    retries: int = 0
    """Samples asked for again."""
    rollout_s: float = 0.0
    """Seconds until the last trajectory was there."""
    reward_s: float = 0.0
    """Seconds after that until the last verdict."""
    rollout_busy_s: float = 0.0
    """Seconds of rollout actors at work, summed."""

    def merged(self, other: Collection) -> Collection:
        """Both together, ``other`` after this one."""
        return Collection(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class _Open:
    """A group being collected."""

    problem: PromptedProblem
    size: int
    samples: list[Sample] = field(default_factory=list)
    issued: int = 0
    attempts_left: int = 0


def sample_seed(seed: int, group_id: int, sample: int) -> int:
    """Seed of one sample: 62 bits of a hash, so that no two samples of a run share a random stream."""
    digest = blake2b(f"{seed}/{group_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Collector:
    """Drives rollout and reward actors."""

    def __init__(
        self,
        rollouts: ActorPool,
        rewards: ActorPool,
        transport: ObjectStoreTransport,
        limits: Limits,
        *,
        seed: int,
        score_truncated: bool,
        on_event: Callable[[str], None],
    ) -> None:
        """``score_truncated``: completions cut at the length cap are scored like others, instead of 0."""
        self._score_truncated = score_truncated
        self._rollouts, self._rewards, self._transport, self._limits = rollouts, rewards, transport, limits
        self._seed, self._on_event = seed, on_event
        self._served: Published | None = None

    @property
    def live(self) -> dict[str, int]:
        """Gauges of the Ray dashboard: actors alive, and replaced so far."""
        return {
            "rollout_actors": len(self._rollouts.handles),
            "reward_actors": len(self._rewards.handles),
            "actor_restarts": self._rollouts.restarts + self._rewards.restarts,
        }

    @property
    def served(self) -> Published:
        """The weights that rollout actors have to serve."""
        assert self._served is not None, "serve weights first"
        return self._served

    def serve(self, published: Published) -> None:
        """Give all rollout actors these weights; one that does not prove them is replaced and asked again."""
        self._served = published
        names = dict(self._rollouts.handles)
        while names:
            proven = self._transport.serve(published, names, self._limits.start_s)
            lost = {name: error for name, error in proven.items() if error}
            names = {}
            for name, error in lost.items():
                new = self._replace_rollout(name, error, prove=False)
                names[new] = self._rollouts.handles[new]

    def collect(self, problems: Mapping[int, PromptedProblem], decoding: Decoding, *, group_size: int) -> Collection:
        """Collect one group for each id and problem, all decoded by the weights served last."""
        return _Collect(self, problems, decoding, group_size).run()

    def _replace_rollout(self, name: str, reason: str, *, prove: bool = True) -> str:
        new = self._rollouts.replace(name, reason)
        self._on_event(f"{name} was lost ({reason}); {new} takes its place")
        wait_ready({new: self._rollouts.handles[new].ready.remote()}, self._limits.start_s, "rollout actor")
        if prove:
            error = self._transport.serve(self.served, {new: self._rollouts.handles[new]}, self._limits.start_s)[new]
            if error:
                raise ClusterError(f"{new} does not serve the current weights: {error}")
        return new

    def _replace_reward(self, name: str, reason: str) -> str:
        new = self._rewards.replace(name, reason)
        self._on_event(f"{name} was lost ({reason}); {new} takes its place")
        wait_ready({new: self._rewards.handles[new].ready.remote()}, self._limits.start_s, "reward actor")
        return new


@dataclass(slots=True)
class _Job:
    """A call in flight."""

    actor: str
    payload: list[Any]
    started: float
    deadline: float


class _Collect:
    """The state of one `Collector.collect`."""

    def __init__(
        self,
        owner: Collector,
        problems: Mapping[int, PromptedProblem],
        decoding: Decoding,
        group_size: int,
    ) -> None:
        self._owner, self._decoding = owner, decoding
        self._limits, self._rollouts, self._rewards = owner._limits, owner._rollouts, owner._rewards
        self._order = list(problems)
        self._open = {
            i: _Open(p, group_size, attempts_left=group_size * (self._limits.max_attempts - 1))
            for i, p in problems.items()
        }
        self._result = Collection()
        self._complete: dict[int, Group] = {}
        self._rolling: dict[Any, _Job] = {}
        self._scoring: dict[Any, _Job] = {}
        self._units: deque[list[Request]] = deque()
        self._again: list[Request] = []

    def run(self) -> Collection:
        """Until every group is complete or failed."""
        start = time.monotonic()
        last_rollout = start
        per_unit = -(-len(self._order) // len(self._rollouts.handles))
        for first in range(0, len(self._order), per_unit):
            ids = self._order[first : first + per_unit]
            self._units.append([self._request(i) for i in ids for _ in range(self._open[i].size)])
        while self._units or self._again or self._rolling or self._scoring:
            self._send_rollouts()
            jobs = self._rolling | self._scoring
            soonest = min(job.deadline for job in jobs.values())
            done, _ = ray.wait(list(jobs), timeout=max(0.0, min(soonest - time.monotonic(), 5.0)))
            for ref in done:
                if ref in self._rolling:
                    self._take_rollout(ref)
                    last_rollout = time.monotonic()
                else:
                    self._take_score(ref)
            self._expire()
        self._result.groups = [self._complete[i] for i in self._order if i in self._complete]
        self._result.rollout_s = last_rollout - start
        self._result.reward_s = time.monotonic() - last_rollout
        return self._result

    def _request(self, group_id: int) -> Request:
        group = self._open[group_id]
        sample, group.issued = group.issued, group.issued + 1
        return Request(group_id, sample, group.problem.prompt_ids, sample_seed(self._owner._seed, group_id, sample))

    def _send_rollouts(self) -> None:
        if self._again and not self._units:
            self._units.append(self._again)
            self._again = []
        busy = {job.actor for job in self._rolling.values()}
        for name, handle in self._rollouts.handles.items():
            if self._units and name not in busy:
                unit = self._units.popleft()
                ref = handle.generate.remote(unit, self._decoding, self._owner.served.version)
                self._rolling[ref] = _job(name, unit, self._limits.rollout_s)

    def _take_rollout(self, ref: Any) -> None:
        job = self._rolling.pop(ref)
        self._result.rollout_busy_s += time.monotonic() - job.started
        try:
            produced: list[tuple[Trajectory, str]] = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            self._owner._replace_rollout(job.actor, _first_line(error))
            self._units.appendleft(job.payload)
            return
        except ray.exceptions.RayTaskError as error:
            # The engine refused or broke on this unit; its samples are tried anew, a bounded number of times.
            self._owner._on_event(f"{job.actor} failed on {len(job.payload)} samples: {_first_line(error.cause)}")
            for request in job.payload:
                self._retry(request.group_id)
            return
        wanted = [(t, text) for t, text in produced if t.group_id in self._open]
        if wanted:
            self._send_scores(wanted)

    def _send_scores(self, payload: list[tuple[Trajectory, str]]) -> None:
        load = Counter({name: 0 for name in self._rewards.handles})
        load.update(job.actor for job in self._scoring.values())
        name = min(load, key=lambda n: load[n])
        items = [(text, self._open[t.group_id].problem.problem.answer) for t, text in payload]
        ref = self._rewards.handles[name].score.remote(items)
        self._scoring[ref] = _job(name, payload, self._limits.start_s + self._limits.reward_s * len(items))

    def _take_score(self, ref: Any) -> None:
        job = self._scoring.pop(ref)
        try:
            results = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            self._owner._replace_reward(job.actor, _first_line(error))
            self._send_scores([(t, text) for t, text in job.payload if t.group_id in self._open])
            return
        for (trajectory, text), result in zip(job.payload, results):
            self._result.verdicts[str(result.verdict)] += 1
            earned = result.verdict.reward
            if earned is None:
                self._retry(trajectory.group_id)
            elif trajectory.group_id in self._open:
                verdict = str(result.verdict)
                if earned > 0 and trajectory.stop_reason == "length" and not self._owner._score_truncated:
                    verdict, earned = "truncated", 0.0
                self._accept(Sample(trajectory.validate(), text, verdict, earned))

    def _accept(self, sample: Sample) -> None:
        group_id = sample.trajectory.group_id
        group = self._open[group_id]
        group.samples.append(sample)
        if len(group.samples) == group.size:
            ordered = sorted(group.samples, key=lambda s: s.trajectory.sample)
            self._complete[group_id] = Group(group_id, group.problem.problem, tuple(ordered))
            del self._open[group_id]

    def _retry(self, group_id: int) -> None:
        """Ask for one more sample of an open group, or give the group up."""
        group = self._open.get(group_id)
        if group is None:
            return
        if group.attempts_left == 0:
            del self._open[group_id]
            self._result.failed.append(group_id)
            return
        group.attempts_left -= 1
        self._result.retries += 1
        self._again.append(self._request(group_id))

    def _expire(self) -> None:
        """Count actors that ran out of time as lost."""
        now = time.monotonic()
        for ref in [r for r, job in self._rolling.items() if job.deadline < now]:
            job = self._rolling.pop(ref)
            self._owner._replace_rollout(job.actor, f"no answer in {self._limits.rollout_s:g} s")
            self._units.appendleft(job.payload)
        for ref in [r for r, job in self._scoring.items() if job.deadline < now]:
            job = self._scoring.pop(ref)
            self._owner._replace_reward(job.actor, "no answer in time")
            self._send_scores([(t, text) for t, text in job.payload if t.group_id in self._open])


def _job(actor: str, payload: Sequence[Any], limit_s: float) -> _Job:
    now = time.monotonic()
    return _Job(actor, list(payload), now, now + limit_s)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
