"""Held-out scores of a run, and the check of invariant 1 on their trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.metrics import Metrics
from learner.group import LearnerGroup
from tstar_ray.collection import Collection
from tstar_ray.collector import Collector
from tstar_ray.config import Config, Stage
from tstar_ray.config_base import WorkError
from tstar_ray.data import PromptedProblem
from tstar_ray.evaluate import Evaluation, summarise
from tstar_ray.reporter import Reporter
from tstar_ray.stage_settings import stage_decoding
from tstar_ray.traces import write_traces

REPLAY_TOLERANCE = 1e-3
"""Largest replay error (nats) in fp32; the tests hold 1e-5, real models have more layers and terms."""
_REPLAYED = 8


class HeldOut:
    """Evaluates the weights that actors serve now, which are the learner's."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        problems: Sequence[PromptedProblem],
        *,
        collector: Collector,
        learner: LearnerGroup,
        stop_ids: tuple[int, ...],
        reporter: Reporter,
        metrics: Metrics,
    ) -> None:
        self._config, self._folder, self._problems, self._stop_ids = config, folder, problems, stop_ids
        self._collector, self._learner, self._reporter, self._metrics = collector, learner, reporter, metrics

    def evaluate(self, update: int, label: str, stage: Stage | None, block: int, count: int) -> Evaluation:
        """Score the first ``count`` problems and report it; decoded as the stage does, or as the curriculum does."""
        return self._score(update, label, stage, block, count)[0]

    def table(self, update: int, label: str) -> list[Evaluation]:
        """One evaluation at each block size, each followed by a replay of some of its trajectories in the learner.
        Raises WorkError where engine and learner disagree, or nothing could be scored."""
        evaluations = []
        for block in self._config.eval_blocks:
            self._reporter.phase(None, f"evaluating the {label} at B={block}")
            scored = self._score(update, f"{label}, B={block}", None, block, self._config.eval.problems)
            evaluations.append(scored[0])
            self._check_replay(scored[1], block)
        return evaluations

    def _score(
        self, update: int, label: str, stage: Stage | None, block: int, count: int
    ) -> tuple[Evaluation, Collection]:
        decoding = stage_decoding(
            self._config, stage, block, temperature=self._config.eval.temperature, stop_ids=self._stop_ids
        )
        # Ids below zero, apart from those of groups that are dispatched for training.
        problems = {-1 - i: problem for i, problem in enumerate(self._problems[:count])}
        with self._metrics.phase("evaluate"):
            batch = self._collector.dispatch(problems, decoding, group_size=1, urgent=True)
            found = self._collector.finish(batch)
        evaluation = summarise(found.groups, decoding, unscored=len(found.failed))
        self._reporter.evaluation(update, label, evaluation)
        self._reporter.samples(update, found.groups)
        return evaluation, found

    def _check_replay(self, found: Collection, block: int) -> None:
        groups = found.groups
        if not groups:
            raise WorkError(f"evaluation at B={block}: no problem could be scored; verdicts {dict(found.verdicts)}")
        error = self._learner.replay_error([g.samples[0].trajectory for g in groups[:_REPLAYED]])
        if self._config.learner.gpus == 0 and not error <= REPLAY_TOLERANCE:
            kept = self._folder / "failed" / f"replay-b{block}.parquet"
            write_traces(kept, groups)
            raise WorkError(
                f"replaying rollouts in the learner misses their log-probs by up to {error:.2e} nats at B={block} "
                f"(tolerance {REPLAY_TOLERANCE:g}): engine and learner disagree, training would be wrong; the "
                f"trajectories are kept in {kept}"
            )
        self._reporter.say(f"  replay check at B={block}: largest log-prob difference {error:.1e}")
