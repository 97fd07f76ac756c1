"""The loop: rollouts, rewards, updates, weights, stages.

    while the curriculum runs
        dispatch    batches of the stage's problems, as many ahead as the window allows
        consume     the oldest batch                                            waits for actors
        observe     collapsed? back to the stage's best weights
        update      TraceRL on the groups with contrast                         waits for the learner
        publish     weights v+1; every actor proves them before it works on     waits for actors
        step        gate open? next stage, with larger blocks

Whatever it waits for, `Collector.wait` keeps rollouts, rewards and supervision going. How fresh rollouts are, and
what is asserted on every batch: `tstar_ray.window`.

**A lost learner rank** takes the run back to its newest checkpoint, in place (`_recover`): weights, optimizer,
curriculum, accounting and data go back together, so that no update is made twice and no group is lost.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.metrics import Metrics
from learner.group import LearnerError, LearnerGroup, LearnerLostError
from learner.report import UpdateReport
from tstar_ray.checkpoint import link_tree, newest_checkpoint, write_checkpoint
from tstar_ray.collection import Collection
from tstar_ray.collector import Collector
from tstar_ray.config import Config, ConfigError, Stage
from tstar_ray.curriculum import Curriculum
from tstar_ray.data import ProblemSets
from tstar_ray.evaluate import Evaluation
from tstar_ray.held_out import HeldOut
from tstar_ray.record import DASHBOARD, Result, accuracy, update_record
from tstar_ray.reporter import Reporter
from tstar_ray.stage_settings import update_spec
from tstar_ray.traces import Origin, write_traces
from tstar_ray.trajectory import Group
from tstar_ray.window import Window


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
        collector.on_live = self._show_actors
        self._held_out = HeldOut(
            config,
            folder,
            problems.held_out,
            collector=collector,
            learner=learner,
            stop_ids=stop_ids,
            reporter=reporter,
            metrics=metrics,
        )
        self._window = Window(
            config,
            collector,
            problems.train,
            stop_ids=stop_ids,
            on_depth=lambda depth: metrics.set("buffer_depth", depth),
        )
        self._curriculum = Curriculum(config.curriculum.resolve(), config.curriculum.rollback)
        self._update = self._version = 0
        self._saved = -1
        """Update whose checkpoint holds the state at hand."""
        self._before: list[Evaluation] = []
        self._best: Path | None = None
        self._losses: list[float] = []
        self._cpu_s = time.process_time()
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
                if self.stop_requested:
                    return self._stop_short(error)
                lost = error

    def _go_on(self) -> Result:
        """From where the state is, to the end."""
        self._publish()
        if not self._before:
            self._before = self._held_out.table(self._update, "start model")
            self._curriculum.state.reference = self._before[0].accuracy
            self._enter_stage()
            self._checkpoint()
        while not self._curriculum.done and not self.stop_requested:
            self._iterate()
        self._window.cancel()
        groups = self._window.ledger.totals
        self._metrics.count_groups(self._window.ledger.ended)
        self._reporter.numbers("groups", self._update, {f"groups_total/{name}": n for name, n in groups.items()})
        if self.stop_requested:
            if self._saved != self._update:
                self._checkpoint()
            return Result(self._before, [], self._update, stopped=True, groups=groups)
        after = self._held_out.table(self._update, "trained model")
        self._learner.export(self._folder / "final")
        return Result(self._before, after, self._update, stopped=False, groups=groups)

    def _iterate(self) -> None:
        """One update."""
        start, stage = time.monotonic(), self._curriculum.stage
        self._fill_window(stage)
        self._reporter.phase(stage, "rollout")
        with self._metrics.phase("rollout"):
            collection = self._window.consume(stage, self._version)
        best = self._curriculum.state.best
        health = self._curriculum.observe(accuracy(collection.groups))
        if health == "collapsed":
            self._roll_back(stage, collection, best, start)
            return
        if health == "best":
            self._keep_best(stage)
        trainable = self._window.settle(stage, collection)
        trained = self._version
        report = self._train(stage, trainable)
        self._window.leave()
        self._update += 1
        if self._config.rollout.max_staleness:
            self._fill_window(stage, ahead=1)
        evaluated = self._evaluate_during(stage)
        self._record(stage, collection, trainable, report, trained, start)
        if self._curriculum.step(evaluated):
            self._leave_stage(stage)
        elif self._update % self._config.run.checkpoint_every == 0:
            self._checkpoint()

    def _fill_window(self, stage: Stage, *, ahead: int = 0) -> None:
        """Dispatch for the updates that the stage has left, ``ahead`` of whose count we are."""
        self._window.fill(stage, stage.gate.updates - self._curriculum.state.step - ahead)

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
                write_traces(kept, groups, Origin(stage.name, self._update))
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

    def _leave_stage(self, stage: Stage) -> None:
        self._reporter.say(f"  stage {self._curriculum.state.history[-1]}")
        self._reporter.stage_ended(self._update, stage)
        self._window.cancel()
        if not self._curriculum.done:
            self._enter_stage()
        self._checkpoint()

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

    def _roll_back(self, stage: Stage, collection: Collection, best: float, start: float) -> None:
        self._window.cancel()
        assert self._best is not None, "a collapse is measured against a best that was saved"
        self._reporter.say(
            f"  stage {stage.name} collapsed to accuracy {accuracy(collection.groups):.3f} "
            f"(best window {best:.3f}); back to its best weights"
        )
        self._learner.load(self._best)
        self._saved = -1  # a checkpoint of this update holds what was given up
        self._version += 1
        self._publish()
        ended = self._curriculum.done or self._curriculum.stage is not stage
        record = self._numbers(collection, [], None, self._version - 1, start)
        record = {name: value for name, value in record.items() if not name.startswith("groups/")}
        # What a checkpoint holds keeps its record, and what is done again after a kill is counted anew.
        self._reporter.collapsed(self._update + (not ended), stage, record)
        if ended:
            self._leave_stage(stage)

    def _evaluate_during(self, stage: Stage) -> float | None:
        every = self._config.eval.every
        if not (self._curriculum.wants_evaluation or (every and self._update % every == 0)):
            return None
        block, count = stage.train_block, self._config.eval.problems_during
        evaluation = self._held_out.evaluate(self._update, f"held-out, B={block}", stage, block, count)
        return evaluation.accuracy

    def _numbers(
        self,
        collection: Collection,
        trainable: Sequence[Group],
        report: UpdateReport | None,
        version: int,
        start: float,
    ) -> dict[str, Any]:
        """Numbers of one batch, which the Ray dashboard gets here."""
        record = update_record(
            collection,
            trainable,
            report,
            asked=self._config.rollout.problems,
            variants=len(self._config.rollout.variants),
            version=version,
            wall_s=time.monotonic() - start,
            busy_s=self._collector.take_busy_seconds(),
            actors=self._collector.rollouts.count,
            seconds=self._metrics.take_seconds() | {"driver_cpu": time.process_time() - self._cpu_s},
        )
        self._cpu_s = time.process_time()
        for gauge, name in DASHBOARD.items():
            self._metrics.set(gauge, record.get(name, 0.0))
        self._metrics.set("learner_restarts", self._learner.restarts)
        self._metrics.set("buffer_depth", self._window.ledger.depth)
        self._metrics.count_groups(self._window.ledger.ended)
        self._metrics.count_verdicts(collection.verdicts)
        return record

    def _show_actors(self, live: Mapping[str, int]) -> None:
        for gauge, count in live.items():
            self._metrics.set(gauge, count)
        self._metrics.count_tokens(self._collector.tokens)

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
        record = self._numbers(collection, trainable, report, version, start) | {
            "stage/index": self._curriculum.state.stage,
            "stage/rollout_block": stage.rollout_block,
            "stage/train_block": stage.train_block,
        }
        self._reporter.update(self._update, self._update_total(), stage, record)
        if self._config.run.save_traces:
            file = self._folder / "traces" / f"update-{self._update:05d}.parquet"
            write_traces(file, collection.groups, Origin(stage.name, self._update - 1))

    def _update_total(self) -> int:
        """Updates made and at most to come."""
        state, stages = self._curriculum.state, self._config.curriculum.resolve()
        ahead = sum(s.gate.updates for s in stages[state.stage :]) - state.step
        return self._update - 1 + ahead

    def _checkpoint(self) -> None:
        """Write a run checkpoint: manifest last, older ones deleted afterwards. Batches in the window are not kept:
        a run that resumes counts them as cancelled, and takes their problems first."""
        stream = self._window.stream
        state = {
            "update": self._update,
            "version": self._version,
            "cursor": stream.cursor,
            "returned": sorted([*stream.returned, *self._window.positions]),
            "ledger": self._window.ledger.state_dict(),
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
        self._saved = self._update
        self._reporter.phase(None, f"wrote {path.name}")

    def _resume(self, folder: Path) -> None:
        checkpoint = newest_checkpoint(folder / "checkpoints", refused=self._reporter.say)
        state = checkpoint.state
        try:
            self._curriculum.load_state_dict(state["curriculum"])
        except KeyError:
            raise ConfigError(f"{checkpoint.folder}: a checkpoint of another command; resume it with that") from None
        except ValueError as error:
            raise ConfigError(f"{checkpoint.folder}: {error}") from error
        shutil.rmtree(self._folder / "best", ignore_errors=True)
        self._best = None
        if (checkpoint.folder / "best").is_dir():
            self._best = self._folder / "best" / f"resumed-u{state['update']:05d}"
            link_tree(checkpoint.folder / "best", self._best)
        self._learner.load(checkpoint.folder / "learner")
        self._window.ledger.load_state_dict(state["ledger"])
        self._metrics.verdicts = state["verdicts"]
        self._update, self._version = state["update"], state["version"]
        self._window.stream.cursor, self._window.stream.returned = state["cursor"], state["returned"]
        self._before = [Evaluation.from_dict(evaluation) for evaluation in state["before"]]
        self._reporter.rewind(self._update)
        self._reporter.say(f"resumed {checkpoint.folder} after update {self._update}")

    def _stop_short(self, error: LearnerLostError) -> Result:
        """The learner was lost while the run was to stop, as where the signal reached all processes: what there is to
        continue from is the newest checkpoint."""
        if not any(self._folder.glob("checkpoints/u*")):
            raise error
        kept = newest_checkpoint(self._folder / "checkpoints", refused=self._reporter.say).state["update"]
        self._reporter.say(f"{error}; updates after {kept} are lost")
        return Result(self._before, [], kept, stopped=True, groups=self._window.ledger.totals)

    def _recover(self, error: LearnerLostError) -> None:
        """Build the learner anew, and take everything back to the newest checkpoint."""
        limit, now = self._config.learner.max_restarts, time.monotonic()
        self._losses = [at for at in self._losses if now - at < 3600] + [now]
        if len(self._losses) > limit:
            raise LearnerError(
                f"{error}\nthe learner was rebuilt {limit} times within an hour already (learner.max_restarts)"
            ) from error
        self._reporter.say(f"{error}; building the learner anew")
        self._window.abandon()
        self._collector.cancel_urgent()
        self._collector.forget_weights()
        version = self._version + 1
        try:
            self._learner.restart(self._config.cluster.start_timeout_s)
            if any(self._folder.glob("checkpoints/u*")):
                self._resume(self._folder)
            else:  # lost before the first: from the start model anew
                self._before = []
                self._reporter.rewind(-1)
        finally:
            self._version = version  # a number means one set of weights, in every process that serves them
