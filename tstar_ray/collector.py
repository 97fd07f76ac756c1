"""From problems to complete, rewarded groups, while whoever waits for something else waits through it.

    dispatch ──► batches ──► units of requests ──► rollout actors ──► chunks ──► reward actors ──► groups
                                  ▲                     │ lost                        │ no reward
                                  └───── reissued ──────┴────────── replaced ─────────┘

`wait` is `ray.wait` that keeps all of this moving: the controller waits for the learner, for a batch, for proofs of
weights through it, and rollouts go on meanwhile.

- Batches are served in the order of dispatch, evaluations first. An actor gets units up to a number of samples in
  flight (``Limits.in_flight``).
- What an actor that was lost had not delivered is reissued; `cluster.pool` replaces the actor.
- A unit that fails in an actor that lives is tried again group by group, then sample by sample, so that what cannot be
  decoded fails alone. An actor that fails at everything counts as lost.
- A sample that could not be scored (verifier timed out, crashed or rejected it) earns nothing: a new sample
  with its own seed takes its place (invariant 7). Past ``max_attempts`` its group counts as failed.
- Every wait has a time limit, in time that the driver itself was running; nothing is dropped for being slow.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.placement import first_line
from cluster.pool import ActorPool
from cluster.weights import Published
from tstar_ray.collection import Batch, Collection, Job, Limits, OpenGroup, Trouble, sample_seed
from tstar_ray.data import PromptedProblem
from tstar_ray.decoding import Decoding, Variant
from tstar_ray.trajectory import Group, Request, Sample, Trajectory

_CHUNK, _TICK_S = 32, 0.5
"""Samples of one call to a reward actor; seconds between looks at limits and supervision."""
_FAILURES = 3
"""Units in a row that an actor may fail at, unless all hold the same group."""
_FAILED = (ray.exceptions.RayTaskError, ray.exceptions.UnserializableException)
"""A call failed in an actor that lives; by any other error of Ray the actor, its node or its answer is gone."""


class Collector:
    """Drives rollout and reward actors."""

    def __init__(
        self,
        rollouts: ActorPool,
        rewards: ActorPool,
        limits: Limits,
        *,
        seed: int,
        score_truncated: bool,
        on_event: Callable[[str], None],
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """``score_truncated``: completions cut at the length cap are scored like others, instead of 0. ``on_tick`` is
        called about twice a second while something is waited for."""
        self.rollouts, self.rewards = rollouts, rewards
        self._limits, self._seed, self._score_truncated = limits, seed, score_truncated
        self._on_event, self._on_tick = on_event, on_tick
        self.on_live: Callable[[Mapping[str, int]], None] = lambda live: None
        """Told of `live` as often."""
        self._served: Published | None = None
        self._batches: list[Batch] = []
        self._numbers = itertools.count()
        self._rolling: dict[Any, Job] = {}
        self._scoring: dict[Any, Job] = {}
        self._unscored: deque[tuple[Batch, list[tuple[Trajectory, str]]]] = deque()
        self._trouble: dict[str, Trouble] = {}
        self._ticked = time.monotonic()
        self.tokens: Counter[str] = Counter()
        """Completion tokens so far, by rollout actor."""
        self._busy: dict[str, float] = {}
        self._busy_s = 0.0

    @property
    def live(self) -> dict[str, int]:
        """Gauges of the Ray dashboard: actors that may work, those to come, and replaced so far."""
        return {
            "rollout_actors": len(self.rollouts.handles),
            "reward_actors": len(self.rewards.handles),
            "rollout_actors_starting": self.rollouts.coming,
            "reward_actors_starting": self.rewards.coming,
            "actor_restarts": self.rollouts.restarts + self.rewards.restarts,
        }

    def take_busy_seconds(self) -> float:
        """Seconds that rollout actors had work, summed over them, since the last call."""
        now = time.monotonic()
        taken = self._busy_s + sum(now - since for since in self._busy.values())
        self._busy_s, self._busy = 0.0, dict.fromkeys(self._busy, now)
        return taken

    def serve(self, published: Published) -> None:
        """Have all rollout actors take these weights; returns once every one has proved them or was replaced, and
        one at least may work. Raises ClusterError past the limit."""
        self._served = published
        self.rollouts.serve(published)
        self._until(lambda: not self.rollouts.proving and bool(self.rollouts.handles))

    def forget_weights(self) -> None:
        """The process that owned the weights served last is gone: actors without them wait for the next."""
        self._served = None
        self.rollouts.forget_weights()

    def dispatch(
        self,
        problems: Mapping[int, PromptedProblem],
        decoding: Decoding,
        *,
        group_size: int,
        variants: Sequence[Variant] = (),
        urgent: bool = False,
        into: Batch | None = None,
        when_done: Callable[[Batch], None] = lambda batch: None,
    ) -> Batch:
        """Ask for one group for each id and problem, decoded by the weights served now or newer; sample i of a group
        takes variant i modulo their number. ``urgent`` ones go before all others, ``into`` adds to a batch.
        ``when_done`` is called when all groups are complete or failed; it may dispatch more into the batch."""
        batch = into or Batch(decoding, variants, group_size, (0 if urgent else 1, next(self._numbers)))
        batch.when_done = when_done
        if batch not in self._batches:
            self._batches = sorted([*self._batches, batch], key=lambda b: b.rank)
        attempts = group_size * (self._limits.max_attempts - 1)
        for group_id, problem in problems.items():
            batch.order.append(group_id)
            batch._open[group_id] = OpenGroup(problem, group_size, attempts)
        ids = list(problems)
        size = -(-len(ids) // self.rollouts.count)
        if self._limits.unit:
            size = min(size, self._limits.unit // group_size)
        size = max(1, size)
        for first in range(0, len(ids), size):
            unit = [self._request(batch, i) for i in ids[first : first + size] for _ in range(group_size)]
            batch._units.append(unit)
        self._send()
        return batch

    def finish(self, batch: Batch) -> Collection:
        """Wait until every group of a batch is complete or failed."""
        self._until(lambda: batch.done)
        return batch.found

    def cancel(self, batch: Batch) -> None:
        """Give a batch up; actors stop decoding it at once."""
        self._batches = [b for b in self._batches if b is not batch]
        running = {job.actor for job in self._rolling.values() if job.batch is batch}
        for name, handle in self.rollouts.all_handles.items():
            if name in running:
                handle.cancel.remote(list(batch.order))
        self._rolling = {ref: job for ref, job in self._rolling.items() if job.batch is not batch}
        self._scoring = {ref: job for ref, job in self._scoring.items() if job.batch is not batch}
        self._unscored = deque(item for item in self._unscored if item[0] is not batch)
        batch._open.clear()
        self._count_busy()

    def cancel_urgent(self) -> None:
        """Give up evaluations that nobody waits for any more."""
        for batch in [b for b in self._batches if b.rank[0] == 0]:
            self.cancel(batch)

    def wait(self, refs: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """`ray.wait` for the first of ``refs``, with rollouts, rewards and supervision going on meanwhile."""
        deadline = time.monotonic() + timeout
        done: list[Any] = []
        while not done and time.monotonic() < deadline:
            self._pump(refs, deadline)
            done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return done, [ref for ref in refs if ref not in done]

    def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._pump()

    def _pump(self, extra: Sequence[Any] = (), deadline: float = float("inf")) -> None:
        """Wait a moment for anything, and handle what is there."""
        self._send()
        pending = [*extra, *self._rolling, *self._scoring, *self.rollouts.refs, *self.rewards.refs]
        limit = max(0.0, min(_TICK_S, deadline - time.monotonic()))
        if pending:
            ray.wait(pending, timeout=limit)
        else:
            time.sleep(limit)
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0) if pending else ([], [])
        for ref in ready:
            if ref in self._rolling:
                self._take_rollout(ref)
            elif ref in self._scoring:
                self._take_score(ref)
            elif not self.rollouts.take(ref):
                self.rewards.take(ref)
        if time.monotonic() - self._ticked >= _TICK_S:
            self._tick()

    def _tick(self) -> None:
        """Limits, supervision, and whoever asked to be called."""
        now = time.monotonic()
        # Time in which the driver did not look counts against nobody.
        away, self._ticked = max(0.0, now - self._ticked - 2 * _TICK_S), now
        for pool, jobs in ((self.rollouts, self._rolling), (self.rewards, self._scoring)):
            for job in jobs.values():
                job.deadline += away
                if job.deadline < now:
                    pool.lost(job.actor, "no answer in time")
            pool.tick({job.actor for job in jobs.values()})
            # Calls of actors that supervision gave up; those of dead ones may never end.
            for ref in [ref for ref, job in jobs.items() if job.actor not in pool.names]:
                self._reissue(jobs.pop(ref))
        self.on_live(self.live)
        self._trouble = {name: trouble for name, trouble in self._trouble.items() if name in self.rollouts.names}
        self._on_tick()

    def _reissue(self, job: Job) -> None:
        if isinstance(job.payload[0], Request):
            job.batch._units.appendleft(job.payload)
        else:
            self._unscored.appendleft((job.batch, job.payload))
        self._count_busy()

    def _request(self, batch: Batch, group_id: int) -> Request:
        group = batch._open[group_id]
        sample, group.issued = group.issued, group.issued + 1
        return Request(
            group_id,
            sample,
            group.problem.prompt_ids,
            sample_seed(self._seed, group_id, sample),
            variant=batch.variants[sample % len(batch.variants)] if batch.variants else None,
        )

    def _send(self) -> None:
        """Give actors what they have room for."""
        self._send_rollouts()
        self._send_scores()

    def _send_rollouts(self) -> None:
        handles = self.rollouts.handles
        load: Counter[str] = Counter(dict.fromkeys(handles, 0))
        for job in self._rolling.values():
            load[job.actor] += len(job.payload)
        for batch in self._batches:
            if batch._again and not batch._units:
                size = self._limits.unit or len(batch._again)
                batch._units.extend(batch._again[i : i + size] for i in range(0, len(batch._again), size))
                batch._again = []
            while batch._units:
                # One in trouble gets one unit at a time, and only what the others have no room for.
                room = {n: 1 if n in self._trouble else self._limits.in_flight for n in handles}
                free = [n for n in handles if load[n] < room[n]]
                if not free:
                    return
                name = min(free, key=lambda n: (n in self._trouble, load[n]))
                unit = [request for request in batch._units.popleft() if request.group_id in batch._open]
                if not unit:
                    continue
                assert self._served is not None, "serve weights first"
                now = time.monotonic()
                ref = handles[name].generate.remote(unit, batch.decoding, self._served.version)
                self._rolling[ref] = Job(batch, name, unit, now, now + self._limits.rollout_s)
                load[name] += len(unit)
                self._busy.setdefault(name, now)

    def _count_busy(self) -> None:
        """Stop the clocks of actors without work."""
        working = {job.actor for job in self._rolling.values()}
        for name in [name for name in self._busy if name not in working]:
            self._busy_s += time.monotonic() - self._busy.pop(name)

    def _take_rollout(self, ref: Any) -> None:
        job = self._rolling.pop(ref)
        self._count_busy()
        try:
            produced: list[tuple[Trajectory, str]] = ray.get(ref)
        except _FAILED as error:
            self._on_event(f"{job.actor} failed on {len(job.payload)} samples: {first_line(error)}")
            self._split(job)
            self._blame(job, first_line(error))
            return
        except ray.exceptions.RayError as error:
            self.rollouts.lost(job.actor, first_line(error))
            self._reissue(job)
            return
        self._trouble.pop(job.actor, None)
        job.batch._rolled = time.monotonic()
        self.tokens[job.actor] += sum(trajectory.completion_len for trajectory, _ in produced)
        for first in range(0, len(produced), _CHUNK):
            self._unscored.append((job.batch, produced[first : first + _CHUNK]))

    def _split(self, job: Job) -> None:
        """Try a unit that failed again in smaller ones; a sample that failed alone is drawn anew, a bounded number of
        times."""
        parts: dict[int, list[Request]] = {}
        for request in job.payload:
            parts.setdefault(request.group_id, []).append(request)
        if len(parts) > 1:
            job.batch._units.extend(parts.values())
        elif len(job.payload) > 1:
            job.batch._units.extend([request] for request in job.payload)
        elif request := self._retry(job.batch, job.payload[0].group_id):
            job.batch._units.append([request])

    def _blame(self, job: Job, reason: str) -> None:
        """Count a failed unit against its actor, and replace one that fails at everything."""
        groups, now = {request.group_id for request in job.payload}, time.monotonic()
        trouble = self._trouble.setdefault(job.actor, Trouble(0, 0.0, groups))
        trouble.groups &= groups
        if job.sent > trouble.at:
            trouble.count, trouble.at = trouble.count + 1, now
        if trouble.count >= _FAILURES and not trouble.groups:
            del self._trouble[job.actor]
            self.rollouts.lost(job.actor, f"failed on {trouble.count} units in a row, the last time: {reason}")

    def _send_scores(self) -> None:
        handles = self.rewards.handles
        load = Counter(dict.fromkeys(handles, 0))
        for job in self._scoring.values():
            load[job.actor] += len(job.payload)
        while self._unscored and any(load[name] < self._limits.scoring for name in handles):
            batch, produced = self._unscored.popleft()
            payload = [(t, text) for t, text in produced if t.group_id in batch._open]
            if not payload:
                continue
            name = min(handles, key=lambda n: load[n])
            items = [(text, batch._open[t.group_id].problem.problem.answer) for t, text in payload]
            load[name] += len(payload)
            now, limit = time.monotonic(), self._limits.start_s + self._limits.reward_s * load[name]
            ref = handles[name].score.remote(items)
            self._scoring[ref] = Job(batch, name, payload, now, now + limit)

    def _take_score(self, ref: Any) -> None:
        job = self._scoring.pop(ref)
        try:
            results = ray.get(ref)
        except ray.exceptions.RayError as error:  # any: a verifier that fails is a verdict
            self.rewards.lost(job.actor, first_line(error))
            self._reissue(job)
            return
        batch = job.batch
        for (trajectory, text), result in zip(job.payload, results):
            batch.found.verdicts[str(result.verdict)] += 1
            earned = result.verdict.reward
            if earned is None:
                if request := self._retry(batch, trajectory.group_id):
                    batch._again.append(request)
            elif trajectory.group_id in batch._open:
                verdict = str(result.verdict)
                if earned > 0 and trajectory.stop_reason == "length" and not self._score_truncated:
                    verdict, earned = "truncated", 0.0
                self._accept(batch, Sample(trajectory.validate(), text, verdict, earned))

    def _accept(self, batch: Batch, sample: Sample) -> None:
        group_id = sample.trajectory.group_id
        group = batch._open[group_id]
        group.samples.append(sample)
        if len(group.samples) == group.size:
            ordered = sorted(group.samples, key=lambda s: s.trajectory.sample)
            batch._complete[group_id] = Group(group_id, group.problem.problem, tuple(ordered))
            self._end(batch, group_id)

    def _retry(self, batch: Batch, group_id: int) -> Request | None:
        """One more sample of an open group; None gives the group up, or it has ended already."""
        group = batch._open.get(group_id)
        if group is None:
            return None
        if group.attempts_left == 0:
            batch.found.failed.append(group_id)
            self._end(batch, group_id)
            return None
        group.attempts_left -= 1
        batch.found.retries += 1
        return self._request(batch, group_id)

    def _end(self, batch: Batch, group_id: int) -> None:
        del batch._open[group_id]
        if batch.done:
            batch._close()
            self._batches = [b for b in self._batches if b is not batch]
            batch.when_done(batch)
