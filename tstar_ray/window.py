"""Batches that are dispatched and not consumed, oldest first: rollouts stay fresh, and every group ends once.

    problems ──fill──► batch, batch, ... ──consume the oldest──► settle ──leave once its weights are live──►
                         ▲     │
                 refill ─┘     └─cancel──► its problems are taken again before any other

**Fresh** (invariant 5). At most ``max_staleness + 1`` batches are in the window: a batch takes its place when it is
dispatched, and leaves it when the weights of the update that consumed it are live (or it taught nothing). Batches are
consumed in the order of dispatch. So between the dispatch of a batch and its consumption at most ``max_staleness``
others are consumed, each of which raises the version by one at most; a batch is dispatched to actors that serve the
newest weights, and actors only ever move to newer ones. Hence learner version - version of any token <=
``max_staleness``, without dropping anything for its age (which would favour short, easy problems). With 0 rollouts
and updates take turns. A roll-back publishes a version of its own, and cancels what is in the window first.

Asserted on every batch: that bound, one block size and it is the stage's (invariant 11: a stage change cancels the
window, and nothing is dispatched beyond a stage's last update), every dispatched group ends once (invariant 6).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from learner.credit import is_trainable
from tstar_ray.collection import Batch, Collection
from tstar_ray.collector import Collector
from tstar_ray.config import Config, Stage
from tstar_ray.config_base import WorkError
from tstar_ray.data import ProblemStream, PromptedProblem
from tstar_ray.ledger import Ledger
from tstar_ray.record import staleness
from tstar_ray.stage_settings import rollout_variants, stage_decoding
from tstar_ray.trajectory import Group


@dataclass(slots=True)
class _Pending:
    """A batch in the window."""

    refills: int
    """Times it may still be refilled."""
    batch: Batch | None = None
    """What the collector works on."""
    positions: dict[int, int] = field(default_factory=dict)
    """Group id -> position of its problem in the stream."""


class Window:
    """Dispatches, consumes and accounts for groups."""

    def __init__(
        self,
        config: Config,
        collector: Collector,
        problems: Sequence[PromptedProblem],
        *,
        stop_ids: tuple[int, ...],
        on_depth: Callable[[int], None],
    ) -> None:
        """``on_depth`` is told how many groups are dispatched and have not ended."""
        self._config, self._collector, self._stop_ids, self._on_depth = config, collector, stop_ids, on_depth
        self._variants = rollout_variants(config)
        self._pending: deque[_Pending] = deque()
        self.stream = ProblemStream(problems, seed=config.run.seed)
        """The problems and how far they were taken."""
        self.ledger = Ledger()
        """The accounting of groups."""

    @property
    def positions(self) -> list[int]:
        """Of the problems in the window."""
        return [position for pending in self._pending for position in pending.positions.values()]

    def fill(self, stage: Stage, left: int) -> None:
        """Dispatch batches up to the staleness bound, and to the ``left`` updates of the stage."""
        while len(self._pending) < min(left, self._config.rollout.max_staleness + 1):
            pending = _Pending(refills=self._config.rollout.refill)
            self._pending.append(pending)
            self._dispatch(stage, pending, self._config.rollout.problems)

    def _dispatch(self, stage: Stage, pending: _Pending, count: int) -> None:
        """Ask for groups of the next problems, as a new batch or into the pending one."""
        problems: dict[int, PromptedProblem] = {}
        for position in self.stream.take(count):
            group_id = self.ledger.dispatch()
            pending.positions[group_id] = position
            problems[group_id] = self.stream.problem(position)
        self._on_depth(self.ledger.depth)
        rollout = self._config.rollout
        decoding = stage_decoding(
            self._config, stage, stage.rollout_block, temperature=rollout.temperature, stop_ids=self._stop_ids
        )
        pending.batch = self._collector.dispatch(
            problems,
            decoding,
            group_size=rollout.group_size,
            variants=self._variants,
            into=pending.batch,
            when_done=lambda batch: self._refill(stage, pending),
        )

    def _refill(self, stage: Stage, pending: _Pending) -> None:
        """Further problems in place of groups that teach nothing (`rollout.refill`).

        Only once a batch is complete, so that a refill does not favour problems with short answers.
        """
        assert pending.batch is not None
        loss, objective = self._config.learner.loss, stage.objective
        useful = sum(is_trainable(g, loss, objective) for g in pending.batch.found.groups)
        missing = self._config.rollout.problems - useful
        if missing > 0 and pending.refills:
            pending.refills -= 1
            self._dispatch(stage, pending, missing)

    def consume(self, stage: Stage, version: int) -> Collection:
        """Wait for the oldest batch, for a learner at ``version``; it stays until `leave`. Raises WorkError where
        none of its groups could be scored."""
        batch = self._pending[0].batch
        assert batch is not None
        collection = self._collector.finish(batch)
        if not collection.groups:
            raise WorkError(
                f"all {len(collection.failed)} groups of an update failed: no sample could be scored; "
                f"verdicts {dict(collection.verdicts)}"
            )
        bound = self._config.rollout.max_staleness
        ages = staleness(collection.groups, version)
        assert set(ages) <= set(range(bound + 1)), f"staleness {min(ages)} to {max(ages)}, the bound is {bound}"
        blocks = {s.trajectory.block_size for g in collection.groups for s in g.samples}
        assert blocks == {stage.rollout_block}, f"blocks {blocks} in a batch of stage {stage.name}"
        return collection

    def settle(self, stage: Stage, collection: Collection) -> list[Group]:
        """End every group of the oldest batch in the ledger; returns those to train on."""
        trainable = []
        for group in collection.groups:
            keep = is_trainable(group, self._config.learner.loss, stage.objective)
            self.ledger.end(group.group_id, "trained" if keep else "filtered")
            if keep:
                trainable.append(group)
        for group_id in collection.failed:
            self.ledger.end(group_id, "failed")
        self.ledger.check()
        return trainable

    def leave(self) -> None:
        """The oldest batch is trained on, and what it taught is live."""
        self._pending.popleft()

    def cancel(self) -> None:
        """Give up every batch that is not consumed."""
        while self._pending:
            pending = self._pending.popleft()
            assert pending.batch is not None
            self._collector.cancel(pending.batch)
            for group_id in pending.positions:
                self.ledger.end(group_id, "cancelled")
            self.stream.give_back(pending.positions.values())
        self.ledger.check()

    def abandon(self) -> None:
        """Give up every batch without accounting, which is about to go back to a checkpoint."""
        for pending in self._pending:
            assert pending.batch is not None
            self._collector.cancel(pending.batch)
        self._pending.clear()
