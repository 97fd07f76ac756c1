"""The loop: rollouts, rewards, updates, weights, stages.

    while the curriculum runs
        dispatch    batches of the stage's problems, as many ahead as the window allows
        consume     the oldest batch                                            waits for actors
        observe     collapsed? back to the stage's best weights
        update      TraceRL on the groups with contrast                         waits for the learner
        publish     weights v+1; every actor proves them before it works on     waits for actors
        step        gate open? next stage, with larger blocks

Whatever it waits for, `Collector.wait` keeps rollouts, rewards and supervision going.

**Fresh** (invariant 5). At most ``max_staleness + 1`` batches are in the window: a batch takes its place when it is
dispatched, and leaves it when the weights of the update that consumed it are live (or it taught nothing). Batches are
consumed in the order of dispatch. So between the dispatch of a batch and its consumption at most ``max_staleness``
others are consumed, each of which raises the version by one at most; a batch is dispatched to actors that serve the
newest weights, and actors only ever move to newer ones. Hence learner version - version of any token <=
``max_staleness``, without dropping anything for its age (which would favour short, easy problems). With 0 rollouts
and updates take turns. A roll-back publishes a version of its own, and cancels what is in the window first.

Asserted on every batch: that bound, one block size and it is the stage's (invariant 11: a stage change cancels the
window, and nothing is dispatched beyond a stage's last update), every dispatched group ends once (invariant 6).

**A lost learner rank** takes the run back to its newest checkpoint, in place (`_recover`): weights, optimizer,
curriculum, accounting and data go back together, so that no update is made twice and no group is lost.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.metrics import Metrics
from learner.credit import is_trainable
from learner.group import LearnerError, LearnerGroup, LearnerLostError
from learner.report import UpdateReport, UpdateSpec
from tstar_ray.checkpoint import link_tree, newest_checkpoint, write_checkpoint
from tstar_ray.collector import Batch, Collection, Collector
from tstar_ray.config import Config, ConfigError, Stage
from tstar_ray.curriculum import Curriculum
from tstar_ray.data import ProblemSets, ProblemStream, PromptedProblem
from tstar_ray.decoding import Decoding, Variant
from tstar_ray.evaluate import Evaluation, summarise
from tstar_ray.ledger import Ledger
from tstar_ray.record import DASHBOARD, accuracy, staleness, update_record
from tstar_ray.reporter import Reporter
from tstar_ray.traces import write_traces
from tstar_ray.trajectory import Group

REPLAY_TOLERANCE = 1e-3
"""Largest start-up replay error (nats) in fp32; the tests hold 1e-5, real models have more layers and terms."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    before: list[Evaluation]
    """Start model at each block size."""
    after: list[Evaluation]
    """Trained model at each block size."""
    updates: int
    """Updates made."""
    stopped: bool
    """Ended early by a signal, at an update boundary, with a checkpoint."""


@dataclass(slots=True)
class _Pending:
    """A batch in the window."""

    refills: int
    """Times it may still be refilled."""
    batch: Batch | None = None
    """What the collector works on."""
    positions: dict[int, int] = field(default_factory=dict)
    """Group id -> position of its problem in the stream."""


class Controller:
    """Owns the curriculum, the accounting and the order of things; the parts do the work."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        learner: LearnerGroup,
        collector: Collector,
        problems: ProblemSets,
        stop_ids: tuple[int, ...],
        reporter: Reporter,
        metrics: Metrics,
    ) -> None:
        self._config, self._folder = config, folder
        self._learner, self._collector = learner, collector
        self._reporter, self._metrics = reporter, metrics
        self._stop_ids, self._held_out = stop_ids, problems.held_out
        self._stream = ProblemStream(problems.train, seed=config.run.seed)
        self._curriculum = Curriculum(config.curriculum.resolve(), config.curriculum.rollback)
        self._variants = tuple(Variant(v.threshold, v.sub_block) for v in config.rollout.variants)
        self._ledger = Ledger()
        self._update = self._version = 0
        self._window: deque[_Pending] = deque()
        self._before: list[Evaluation] = []
        self._best: Path | None = None
        self._losses: list[float] = []
        self.stop_requested = False
        """Set by a signal handler: stop at the next update boundary."""

    def run(self) -> Result:
        """Everything, from the start table to the end table."""
        self._learner.wait = self._collector.wait
        lost: LearnerLostError | None = None
        while True:
            try:
                if lost:
                    self._recover(lost)
                elif self._config.run.resume:
                    self._resume(self._config.run.resume)
                return self._go_on()
            except LearnerLostError as error:
                lost = error

    def _go_on(self) -> Result:
        """From where the state is, to the end."""
        self._publish()
        if not self._before:
            self._before = self._tables("start model")
            self._curriculum.state.reference = self._before[0].accuracy
            self._enter_stage()
            self._checkpoint()
        while not self._curriculum.done and not self.stop_requested:
            self._iterate()
        self._cancel_window()
        if self.stop_requested:
            self._checkpoint()
            return Result(self._before, [], self._update, stopped=True)
        after = self._tables("trained model")
        self._learner.export(self._folder / "final")
        return Result(self._before, after, self._update, stopped=False)

    def _iterate(self) -> None:
        """One update."""
        start, stage = time.monotonic(), self._curriculum.stage
        self._fill_window(stage)
        collection = self._consume(stage)
        health = self._curriculum.observe(accuracy(collection.groups))
        if health == "collapsed":
            self._roll_back(stage, collection)
            return
        if health == "best":
            self._keep_best(stage)
        trainable = self._settle(collection)
        trained = self._version
        report = self._train(stage, trainable)
        self._window.popleft()
        self._update += 1
        if self._config.rollout.max_staleness:
            self._fill_window(stage, ahead=1)
        evaluated = self._evaluate_during(stage)
        self._record(stage, collection, trainable, report, trained, start)
        if self._curriculum.step(evaluated):
            self._reporter.say(f"  stage {self._curriculum.state.history[-1]}")
            self._reporter.stage_ended(self._update, stage)
            self._cancel_window()
            if not self._curriculum.done:
                self._enter_stage()
            self._checkpoint()
        elif self._update % self._config.run.checkpoint_every == 0:
            self._checkpoint()

    def _fill_window(self, stage: Stage, *, ahead: int = 0) -> None:
        """Dispatch batches up to the staleness bound and the stage's last update, ``ahead`` of whose count we are."""
        left = stage.gate.updates - self._curriculum.state.step - ahead
        while len(self._window) < min(left, self._config.rollout.max_staleness + 1):
            pending = _Pending(refills=self._config.rollout.refill)
            self._window.append(pending)
            self._dispatch(stage, pending, self._config.rollout.problems)

    def _dispatch(self, stage: Stage, pending: _Pending, count: int) -> None:
        """Ask for groups of the next problems, as a new batch or into the pending one."""
        rollout = self._config.rollout
        problems: dict[int, PromptedProblem] = {}
        for position in self._stream.take(count):
            group_id = self._ledger.dispatch()
            pending.positions[group_id] = position
            problems[group_id] = self._stream.problem(position)
        self._metrics.set("buffer_depth", self._ledger.depth)
        pending.batch = self._collector.dispatch(
            problems,
            replace(self._decoding(stage, stage.rollout_block, rollout.temperature), variants=self._variants),
            group_size=rollout.group_size,
            into=pending.batch,
            when_done=lambda batch: self._refill(stage, pending),
        )

    def _refill(self, stage: Stage, pending: _Pending) -> None:
        """Further problems in place of groups that teach nothing (`rollout.refill`).

        Only once a batch is complete, so that a refill does not favour problems with short answers.
        """
        assert pending.batch is not None
        useful = sum(is_trainable(g, self._config.learner.loss) for g in pending.batch.found.groups)
        missing = self._config.rollout.problems - useful
        if missing > 0 and pending.refills:
            pending.refills -= 1
            self._dispatch(stage, pending, missing)

    def _consume(self, stage: Stage) -> Collection:
        """Wait for the oldest batch; it stays in the window until what it teaches is live."""
        batch = self._window[0].batch
        assert batch is not None
        self._reporter.phase(stage, "rollout")
        with self._metrics.phase("rollout"):
            collection = self._collector.finish(batch)
        if not collection.groups:
            raise RuntimeError(
                f"all {len(collection.failed)} groups of update {self._update + 1} failed: no sample could be "
                f"scored; verdicts {dict(collection.verdicts)}"
            )
        bound = self._config.rollout.max_staleness
        ages = staleness(collection.groups, self._version)
        assert set(ages) <= set(range(bound + 1)), f"staleness {min(ages)} to {max(ages)}, the bound is {bound}"
        blocks = {s.trajectory.block_size for g in collection.groups for s in g.samples}
        assert blocks == {stage.rollout_block}, f"blocks {blocks} in a batch of stage {stage.name}"
        return collection

    def _cancel_window(self) -> None:
        """Give up every batch that is not consumed; its problems are taken again before any other."""
        while self._window:
            pending = self._window.popleft()
            assert pending.batch is not None
            self._collector.cancel(pending.batch)
            for group_id in pending.positions:
                self._ledger.end(group_id, "cancelled")
            self._stream.give_back(pending.positions.values())
        self._ledger.check()

    def _settle(self, collection: Collection) -> list[Group]:
        """End every group of the batch in the ledger; returns those to train on."""
        trainable = []
        for group in collection.groups:
            keep = is_trainable(group, self._config.learner.loss)
            self._ledger.end(group.group_id, "trained" if keep else "filtered")
            if keep:
                trainable.append(group)
        for group_id in collection.failed:
            self._ledger.end(group_id, "failed")
        self._ledger.check()
        return trainable

    def _train(self, stage: Stage, groups: Sequence[Group]) -> UpdateReport | None:
        """Update and publish; without contrast in any group there is nothing to learn, and the weights stay."""
        if not groups:
            return None
        self._reporter.phase(stage, "train")
        with self._metrics.phase("train"):
            try:
                report = self._learner.update(groups, update_spec(self._config, stage), update=self._update)
            except LearnerLostError:
                raise
            except LearnerError as error:
                kept = self._folder / "failed" / f"update-{self._update + 1:05d}.parquet"
                write_traces(kept, groups)
                raise LearnerError(
                    f"{error}\nits trajectories are kept; run the update alone with learner.replay={kept}"
                ) from error
        self._version += 1
        self._publish()
        return report

    def _publish(self) -> None:
        with self._metrics.phase("publish"):
            self._collector.serve(self._learner.publish(self._version))
        self._metrics.set("weight_version", self._version)

    def _enter_stage(self) -> None:
        stage = self._curriculum.stage
        self._best = None
        shutil.rmtree(self._folder / "best", ignore_errors=True)
        self._learner.start_stage(reset_optimizer=stage.reset_optimizer)
        self._reporter.say(
            f"stage {stage.name}: rollout block {stage.rollout_block}, train block {stage.train_block}, "
            f"at most {stage.gate.updates} updates, gate {stage.gate.kind}"
        )
        index = self._curriculum.state.stage
        self._metrics.set("stage", index)
        self._metrics.set("rollout_block_size", stage.rollout_block)
        self._metrics.set("train_block_size", stage.train_block)

    def _keep_best(self, stage: Stage) -> None:
        """Save the weights at hand, which the batch just consumed has not trained; those that decoded it are up to
        ``max_staleness`` versions older."""
        # Never over the one before: checkpoints may share its files.
        previous, self._best = self._best, self._folder / "best" / f"{stage.name}-u{self._update:05d}"
        with self._metrics.phase("checkpoint"):
            shutil.rmtree(self._best, ignore_errors=True)
            self._learner.save(self._best)
        if previous and previous != self._best:
            shutil.rmtree(previous)

    def _roll_back(self, stage: Stage, collection: Collection) -> None:
        self._cancel_window()
        assert self._best is not None, "a collapse is measured against a best that was saved"
        best = self._curriculum.state.best
        self._reporter.say(
            f"  stage {stage.name} collapsed to accuracy {accuracy(collection.groups):.3f} "
            f"(best window {best:.3f}); back to its best weights"
        )
        self._learner.load(self._best)
        self._version += 1
        self._publish()
        if not self._curriculum.done and self._curriculum.stage is not stage:
            self._enter_stage()

    def _decoding(self, stage: Stage | None, block: int, temperature: float) -> Decoding:
        """Settings of the stage at one block size; its step count applies to its own rollout block only."""
        rollout, curriculum = self._config.rollout, self._config.curriculum
        own = stage is not None and block == stage.rollout_block
        return Decoding(
            block_size=block,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=self._stop_ids,
            strategy=stage.strategy if stage else curriculum.strategy,
            denoising_steps=stage.denoising_steps if stage and own else None,
            threshold=stage.threshold if stage else curriculum.threshold,
            entropy_bound=rollout.entropy_bound,
            temperature=temperature,
            confidence=rollout.confidence,
        )

    def _evaluate(self, stage: Stage | None, block: int, count: int) -> tuple[Evaluation, list[Group]]:
        decoding = self._decoding(stage, block, self._config.eval.temperature)
        # Ids below zero, apart from those of groups that are dispatched for training.
        problems = {-1 - i: problem for i, problem in enumerate(self._held_out[:count])}
        with self._metrics.phase("evaluate"):
            batch = self._collector.dispatch(problems, decoding, group_size=1, urgent=True)
            found = self._collector.finish(batch)
        return summarise(found.groups, decoding, unscored=len(found.failed)), found.groups

    def _tables(self, label: str) -> list[Evaluation]:
        """One evaluation at each block size, and the start-up self-check of invariant 1 on their trajectories."""
        evaluations = []
        for block in self._config.eval_blocks:
            self._reporter.phase(None, f"evaluating the {label} at B={block}")
            evaluation, groups = self._evaluate(None, block, self._config.eval.problems)
            self._reporter.evaluation(self._update, f"{label}, B={block}", evaluation)
            self._reporter.samples(self._update, groups)
            evaluations.append(evaluation)
            self._check_replay(groups, block)
        return evaluations

    def _check_replay(self, groups: Sequence[Group], block: int) -> None:
        error = self._learner.replay_error([g.samples[0].trajectory for g in groups[:8]])
        if self._config.learner.gpus == 0 and not error <= REPLAY_TOLERANCE:
            kept = self._folder / "failed" / f"replay-b{block}.parquet"
            write_traces(kept, groups)
            raise RuntimeError(
                f"replaying rollouts in the learner misses their log-probs by up to {error:.2e} nats at B={block} "
                f"(tolerance {REPLAY_TOLERANCE:g}): engine and learner disagree, training would be wrong; the "
                f"trajectories are kept in {kept}"
            )
        self._reporter.say(f"  replay check at B={block}: largest log-prob difference {error:.1e}")

    def _evaluate_during(self, stage: Stage) -> float | None:
        every = self._config.eval.every
        if not (self._curriculum.wants_evaluation or (every and self._update % every == 0)):
            return None
        evaluation, groups = self._evaluate(stage, stage.train_block, self._config.eval.problems_during)
        self._reporter.evaluation(self._update, f"held-out, B={stage.train_block}", evaluation)
        self._reporter.samples(self._update, groups)
        return evaluation.accuracy

    def _record(
        self,
        stage: Stage,
        collection: Collection,
        trainable: Sequence[Group],
        report: UpdateReport | None,
        version: int,
        start: float,
    ) -> None:
        """Numbers of one update to console, TensorBoard, JSONL, the Ray dashboard, and traces to Parquet."""
        record = update_record(
            collection,
            trainable,
            report,
            asked=self._config.rollout.problems,
            version=version,
            wall_s=time.monotonic() - start,
            busy_s=self._collector.take_busy_seconds(),
            actors=self._collector.rollouts.count,
            seconds=self._metrics.take_seconds(),
        )
        record |= {
            "stage/index": self._curriculum.state.stage,
            "stage/rollout_block": stage.rollout_block,
            "stage/train_block": stage.train_block,
        }
        for gauge, name in DASHBOARD.items():
            self._metrics.set(gauge, record.get(name, 0.0))
        for gauge, live in self._collector.live.items():
            self._metrics.set(gauge, live)
        self._metrics.set("learner_restarts", self._learner.restarts)
        self._metrics.set("buffer_depth", self._ledger.depth)
        self._metrics.count_groups(self._ledger.ended)
        self._metrics.count_verdicts(collection.verdicts)
        self._metrics.count_tokens(self._collector.tokens)
        self._reporter.update(self._update, self._update_total(), stage, record)
        if self._config.run.save_traces:
            write_traces(self._folder / "traces" / f"update-{self._update:05d}.parquet", collection.groups)

    def _update_total(self) -> int:
        """Updates made and at most to come."""
        state, stages = self._curriculum.state, self._config.curriculum.resolve()
        ahead = sum(s.gate.updates for s in stages[state.stage :]) - state.step
        return self._update - 1 + ahead

    def _checkpoint(self) -> None:
        """Write a run checkpoint: manifest last, older ones deleted afterwards. Batches in the window are not kept:
        a run that resumes counts them as cancelled, and takes their problems first."""
        waiting = [position for pending in self._window for position in pending.positions.values()]
        state = {
            "update": self._update,
            "version": self._version,
            "cursor": self._stream.cursor,
            "returned": sorted([*self._stream.returned, *waiting]),
            "ledger": self._ledger.state_dict(),
            "curriculum": self._curriculum.state_dict(),
            "before": [e.to_dict() for e in self._before],
            "verdicts": self._metrics.verdicts,
        }

        def fill(folder: Path) -> None:
            self._learner.save(folder / "learner")
            if self._best and self._curriculum.state.best >= 0:
                link_tree(self._best, folder / "best")

        with self._metrics.phase("checkpoint"):
            path = write_checkpoint(
                self._folder / "checkpoints",
                self._update,
                json.loads(json.dumps(state)),
                fill,
                keep=self._config.run.keep_checkpoints,
            )
        self._reporter.phase(None, f"wrote {path.name}")

    def _resume(self, folder: Path) -> None:
        checkpoint = newest_checkpoint(folder / "checkpoints", refused=self._reporter.say)
        state = checkpoint.state
        try:
            self._curriculum.load_state_dict(state["curriculum"])
        except ValueError as error:
            raise ConfigError(f"{checkpoint.folder}: {error}") from error
        shutil.rmtree(self._folder / "best", ignore_errors=True)
        self._best = None
        if (checkpoint.folder / "best").is_dir():
            self._best = self._folder / "best" / f"resumed-u{state['update']:05d}"
            link_tree(checkpoint.folder / "best", self._best)
        self._learner.load(checkpoint.folder / "learner")
        self._ledger.load_state_dict(state["ledger"])
        self._metrics.verdicts = state["verdicts"]
        self._update, self._version = state["update"], state["version"]
        self._stream.cursor, self._stream.returned = state["cursor"], state["returned"]
        self._before = [Evaluation(**{**e, "decoding": Decoding(**_tuples(e["decoding"]))}) for e in state["before"]]
        self._reporter.rewind(self._update)
        self._reporter.say(f"resumed {checkpoint.folder} after update {self._update}")

    def _recover(self, error: LearnerLostError) -> None:
        """Build the learner anew, and take everything back to the newest checkpoint."""
        limit, now = self._config.learner.max_restarts, time.monotonic()
        self._losses = [at for at in self._losses if now - at < 3600] + [now]
        if len(self._losses) > limit:
            raise LearnerError(
                f"{error}\nthe learner was rebuilt {limit} times within an hour already (learner.max_restarts)"
            ) from error
        self._reporter.say(f"{error}; building the learner anew")
        for pending in self._window:
            assert pending.batch is not None
            self._collector.cancel(pending.batch)
        self._window.clear()
        self._collector.cancel_urgent()
        version = self._version + 1
        try:
            self._learner.restart(self._config.cluster.start_timeout_s)
            if self._before or self._config.run.resume:
                self._resume(self._folder)
        finally:
            self._version = version  # a number means one set of weights, in every process that serves them


def update_spec(config: Config, stage: Stage) -> UpdateSpec:
    """How a stage trains."""
    comparable = not stage.is_bridge and stage.shrink == 1 and config.learner.loss.trace == "trace"
    level = config.learner.loss.correction.level
    if level == "auto":
        level = "token" if comparable and config.rollout.max_staleness else "none"
    return UpdateSpec(
        block_size=stage.train_block,
        shrink=stage.shrink,
        lr=stage.lr or config.learner.lr,
        length_norm=config.learner.loss.length_norm or config.rollout.max_new_tokens,
        compare_recorded=comparable,
        correction=level,
    )


def _tuples(decoding: dict[str, Any]) -> dict[str, Any]:
    return decoding | {"stop_ids": tuple(decoding["stop_ids"])}
