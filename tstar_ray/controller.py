"""The loop: rollouts, rewards, updates, weights, stages.

    while the curriculum runs
        collect     groups of the stage's problems, decoded by weights v        waits for actors
        observe     collapsed? back to the stage's best weights
        update      TraceRL on the groups with contrast                         waits for the learner
        publish     weights v+1; every actor proves them before it works        waits for actors
        step        gate open? next stage, with larger blocks

Synchronous: a batch is decoded by the newest weights (staleness bound 0, asserted when it is consumed). What an
asynchronous loop would replace is the `Collector` behind `collect`.

Asserted on every batch: decoded by exactly the current weights (invariant 5), one block size and it is the
stage's (invariant 11), every dispatched group ended once (invariant 6).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.metrics import Metrics
from learner.credit import is_trainable
from learner.group import LearnerError, LearnerGroup
from learner.report import UpdateReport, UpdateSpec, report_dict
from tstar_ray.checkpoint import newest_checkpoint, write_checkpoint
from tstar_ray.collector import Collection, Collector
from tstar_ray.config import Config, ConfigError, Stage
from tstar_ray.curriculum import Curriculum
from tstar_ray.data import ProblemSets, ProblemStream, PromptedProblem
from tstar_ray.decoding import Decoding
from tstar_ray.evaluate import Evaluation, summarise
from tstar_ray.ledger import Ledger
from tstar_ray.reporter import Reporter
from tstar_ray.traces import write_traces
from tstar_ray.trajectory import Group, tokens_per_forward

REPLAY_TOLERANCE = 1e-3
"""Largest start-up replay error (nats) in fp32; the tests hold 1e-5, real models have more layers and terms."""


_DASHBOARD = {
    "accuracy": "rollout/accuracy",
    "tokens_per_forward": "rollout/tpf",
    "reward": "rollout/reward",
    "kl": "learner/kl",
    "rollout_idle": "idle/rollout",
    "learner_idle": "idle/learner",
    "publish_seconds": "seconds/publish",
}
"""Gauge of `cluster.metrics` -> number of an update's record."""


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
        self._ledger = Ledger()
        self._update = self._version = 0
        self._before: list[Evaluation] = []
        self._best: Path | None = None
        self.stop_requested = False
        """Set by a signal handler: stop at the next update boundary."""

    def run(self) -> Result:
        """Everything, from the start table to the end table."""
        if self._config.run.resume:
            self._resume(self._config.run.resume)
        self._publish()
        if not self._update:
            self._before = self._tables("start model")
            self._curriculum.state.reference = self._before[0].accuracy
            self._enter_stage()
        while not self._curriculum.done and not self.stop_requested:
            self._iterate()
        self._ledger.check()
        if self.stop_requested:
            self._checkpoint()
            return Result(self._before, [], self._update, stopped=True)
        after = self._tables("trained model")
        self._learner.export(self._folder / "final")
        return Result(self._before, after, self._update, stopped=False)

    def _iterate(self) -> None:
        """One update."""
        start, stage = time.monotonic(), self._curriculum.stage
        collection = self._collect(stage)
        accuracy = _accuracy(collection.groups)
        health = self._curriculum.observe(accuracy)
        if health == "collapsed":
            self._roll_back(stage, collection)
            return
        if health == "best":
            self._keep_best(stage)
        trainable = self._settle(collection)
        report = self._train(stage, trainable)
        self._update += 1
        evaluated = self._evaluate_during(stage)
        self._record(stage, collection, trainable, report, start)
        if self._curriculum.step(evaluated):
            self._reporter.say(f"  stage {self._curriculum.state.history[-1]}")
            self._checkpoint()
            if not self._curriculum.done:
                self._enter_stage()
        elif self._update % self._config.run.checkpoint_every == 0:
            self._checkpoint()

    def _collect(self, stage: Stage) -> Collection:
        """Rollouts of one update; with `rollout.refill`, further rounds in place of groups that teach nothing.

        Rounds are waited for whole, so that a refill does not favour problems with short answers.
        """
        rollout = self._config.rollout
        collection = self._collect_round(stage, rollout.problems)
        for _ in range(rollout.refill):
            trainable = sum(is_trainable(g, self._config.learner.loss) for g in collection.groups)
            if trainable >= rollout.problems:
                break
            collection = collection.merged(self._collect_round(stage, rollout.problems - trainable))
        if not collection.groups:
            raise RuntimeError(
                f"all {len(collection.failed)} groups of update {self._update + 1} failed: no sample could be "
                f"scored; verdicts {dict(collection.verdicts)}"
            )
        return collection

    def _collect_round(self, stage: Stage, count: int) -> Collection:
        rollout = self._config.rollout
        problems = {self._ledger.dispatch(): p for p in self._stream.take(count)}
        self._metrics.set("buffer_depth", self._ledger.depth)
        self._reporter.phase(stage, "rollout")
        decoding = self._decoding(stage, stage.rollout_block, rollout.temperature)
        with self._metrics.phase("rollout"):
            collection = self._collector.collect(problems, decoding, group_size=rollout.group_size)
        for trajectory in (s.trajectory for g in collection.groups for s in g.samples):
            assert (trajectory.weight_versions == self._version).all(), "stale trajectory in a synchronous batch"
            assert trajectory.block_size == stage.rollout_block, "trajectory of another stage"
        return collection

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
        """Save the weights that produced the batch just collected; they are not yet trained on it."""
        self._best = self._folder / "best" / stage.name
        with self._metrics.phase("checkpoint"):
            self._learner.save(self._best)

    def _roll_back(self, stage: Stage, collection: Collection) -> None:
        self._ledger.cancel_open()
        assert self._best is not None, "a collapse is measured against a best that was saved"
        best = self._curriculum.state.best
        self._reporter.say(
            f"  stage {stage.name} collapsed to accuracy {_accuracy(collection.groups):.3f} "
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
        problems: dict[int, PromptedProblem] = dict(enumerate(self._held_out[:count]))
        with self._metrics.phase("evaluate"):
            found = self._collector.collect(problems, decoding, group_size=1)
        return summarise(found.groups, decoding, unscored=len(found.failed)), found.groups

    def _tables(self, label: str) -> list[Evaluation]:
        """One evaluation at each block size, and the start-up self-check of invariant 1 on their trajectories."""
        evaluations = []
        for block in self._config.eval_blocks:
            self._reporter.phase(None, f"evaluating the {label} at B={block}")
            evaluation, groups = self._evaluate(None, block, self._config.eval.problems)
            self._reporter.evaluation(self._update, f"{label}, B={block}", evaluation)
            evaluations.append(evaluation)
            self._check_replay(groups, block)
        return evaluations

    def _check_replay(self, groups: Sequence[Group], block: int) -> None:
        error = self._learner.replay_error([g.samples[0].trajectory for g in groups[:8]])
        if self._config.learner.gpus == 0 and not error <= REPLAY_TOLERANCE:
            raise RuntimeError(
                f"replaying rollouts in the learner misses their log-probs by up to {error:.2e} nats at B={block} "
                f"(tolerance {REPLAY_TOLERANCE:g}): engine and learner disagree, training would be wrong"
            )
        self._reporter.say(f"  replay check at B={block}: largest log-prob difference {error:.1e}")

    def _evaluate_during(self, stage: Stage) -> float | None:
        every = self._config.eval.every
        if not (self._curriculum.wants_evaluation or (every and self._update % every == 0)):
            return None
        evaluation, _ = self._evaluate(stage, stage.train_block, self._config.eval.problems_during)
        self._reporter.evaluation(self._update, f"held-out, B={stage.train_block}", evaluation)
        return evaluation.accuracy

    def _record(
        self,
        stage: Stage,
        collection: Collection,
        trainable: Sequence[Group],
        report: UpdateReport | None,
        start: float,
    ) -> None:
        """Numbers of one update to console, TensorBoard, JSONL, the Ray dashboard, and traces to Parquet."""
        samples = [s for g in collection.groups for s in g.samples]
        trajectories = [s.trajectory for s in samples]
        wall = time.monotonic() - start
        seconds = self._metrics.take_seconds()
        actors = self._config.actors.count
        record: dict[str, Any] = {
            "rollout/accuracy": _accuracy(collection.groups),
            "rollout/reward": float(np.mean([s.reward for s in samples])),
            "rollout/tpf": tokens_per_forward(trajectories, commits=False),
            "rollout/tpf_with_commits": tokens_per_forward(trajectories, commits=True),
            "rollout/truncated": float(np.mean([t.stop_reason == "length" for t in trajectories])),
            "rollout/mean_tokens": float(np.mean([t.completion_len for t in trajectories])),
            "rollout/tokens_per_s": sum(t.completion_len for t in trajectories) / max(collection.rollout_s, 1e-9),
            "groups/trained": len(trainable),
            "groups/filtered": len(collection.groups) - len(trainable),
            "groups/failed": len(collection.failed),
            "groups/refilled": len(collection.groups) + len(collection.failed) - self._config.rollout.problems,
            "groups/retried_samples": collection.retries,
            "idle/rollout": 1 - collection.rollout_busy_s / (wall * actors),
            "idle/learner": 1 - seconds.get("train", 0.0) / wall,
            "seconds/update": wall,
            **{f"verdict/{verdict}": count for verdict, count in collection.verdicts.items()},
            **{f"seconds/{phase}": s for phase, s in seconds.items()},
            "seconds/rollout": collection.rollout_s,
            "seconds/reward": collection.reward_s,
        }
        for phase in ("train", "publish"):
            record.setdefault(f"seconds/{phase}", 0.0)
        if report:
            record |= {f"learner/{k}": v for k, v in report_dict(report).items() if not math.isnan(v)}
        record |= {"stage/index": self._curriculum.state.stage, "stage/train_block": stage.train_block}
        for gauge, name in _DASHBOARD.items():
            self._metrics.set(gauge, record.get(name, 0.0))
        for gauge, live in self._collector.live.items():
            self._metrics.set(gauge, live)
        self._metrics.set("buffer_depth", self._ledger.depth)
        self._metrics.count_groups(self._ledger.ended)
        self._metrics.count_verdicts(collection.verdicts)
        self._reporter.update(self._update, self._update_total(), stage, record)
        if self._config.run.save_traces:
            write_traces(self._folder / "traces" / f"update-{self._update:05d}.parquet", collection.groups)

    def _update_total(self) -> int:
        """Updates made and at most to come."""
        state, stages = self._curriculum.state, self._config.curriculum.resolve()
        ahead = sum(s.gate.updates for s in stages[state.stage :]) - state.step
        return self._update - 1 + ahead

    def _checkpoint(self) -> None:
        """Write a run checkpoint: manifest last, older ones deleted afterwards."""
        state = {
            "update": self._update,
            "version": self._version,
            "cursor": self._stream.cursor,
            "ledger": self._ledger.state_dict(),
            "curriculum": self._curriculum.state_dict(),
            "before": [e.to_dict() for e in self._before],
        }
        with self._metrics.phase("checkpoint"):
            path = write_checkpoint(
                self._folder / "checkpoints",
                self._update,
                json.loads(json.dumps(state)),
                lambda folder: self._learner.save(folder / "learner"),
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
        # The best weights of the stage are not in the checkpoint: the collapse guard starts over.
        self._curriculum.state.best = -1.0
        self._curriculum.state.accuracies.clear()
        self._learner.load(checkpoint.folder / "learner")
        self._ledger.load_state_dict(state["ledger"])
        self._update, self._version = state["update"], state["version"]
        self._stream.cursor = state["cursor"]
        self._before = [Evaluation(**{**e, "decoding": Decoding(**_tuples(e["decoding"]))}) for e in state["before"]]
        self._reporter.say(f"resumed {checkpoint.folder} after update {self._update}")


def update_spec(config: Config, stage: Stage) -> UpdateSpec:
    """How a stage trains."""
    return UpdateSpec(
        block_size=stage.train_block,
        shrink=stage.shrink,
        lr=stage.lr or config.learner.lr,
        length_norm=config.learner.loss.length_norm or config.rollout.max_new_tokens,
        compare_recorded=not stage.is_bridge and stage.shrink == 1 and config.learner.loss.trace == "trace",
    )


def _tuples(decoding: dict[str, Any]) -> dict[str, Any]:
    return decoding | {"stop_ids": tuple(decoding["stop_ids"])}


def _accuracy(groups: Sequence[Group]) -> float:
    """Share of correct samples."""
    verdicts = [s.verdict == "correct" for g in groups for s in g.samples]
    return float(np.mean(verdicts)) if verdicts else 0.0
