"""The numbers a report shows, computed once: held-out scores, stability of each stage, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tstar_ray.run_folder import RunFolder, StageSpan
from tstar_ray.scores import Drift, drawdown, drift, spikes


@dataclass(frozen=True, slots=True)
class Score:
    """One held-out evaluation."""

    accuracy: float
    """Share of correct answers."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    tpf: float
    """Tokens per forward, without commits."""
    tpf_with_commits: float
    """With commits."""
    truncated: float
    """Share cut at the length cap."""


@dataclass(frozen=True, slots=True)
class BlockScores:
    """The start model and the trained one at one block size."""

    block_size: int
    """B."""
    start: Score
    """Before training."""
    end: Score | None
    """After it; None while the run goes on."""


@dataclass(frozen=True, slots=True)
class StageStability:
    """Measures of algorithm reference 9.7 for one stage."""

    name: str
    """Of the stage."""
    block: str
    """Block size, or rollout > train in a bridge."""
    updates: int
    """Made in it."""
    first: float
    """Rollout accuracy of its first update."""
    last: float
    """Of its last."""
    drawdown: float
    """Largest fall of accuracy within the stage below an earlier value."""
    drawdown_of: str
    """Which accuracy: ``held-out`` where it was measured twice or more, else ``rollout``."""
    kl_spikes: int
    """Updates whose KL exceeds 5 times the median."""
    grad_spikes: int
    """The same of the gradient norm."""
    clip_fraction: float
    """Mean share of tokens whose gradient the clip took away."""
    truncated: float
    """Mean share of completions cut at the cap."""
    drift: Drift | None
    """First against last updates."""

    @property
    def alarm(self) -> bool:
        """Faster but worse."""
        return self.drift is not None and self.drift.faster_but_worse


def block_scores(run: RunFolder) -> list[BlockScores]:
    """Held-out scores at each block size, before and after."""
    result = run.result
    if result:
        before = {e["decoding"]["block_size"]: _score(e) for e in result["before"]}
        after = {e["decoding"]["block_size"]: _score(e) for e in result["after"]}
    else:
        before = {e["block_size"]: _score(e) for e in run.evaluations if e["update"] == 0}
        after = {}
    return [BlockScores(block, before[block], after.get(block)) for block in sorted(before)]


def _score(record: dict[str, Any]) -> Score:
    names = ("accuracy", "low", "high", "tpf", "tpf_with_commits", "truncated")
    return Score(**{name: float(record.get(name, float("nan"))) for name in names})


def stability(run: RunFolder) -> list[StageStability]:
    """Every stage that made an update."""
    return [_stability(run, span) for span in run.stages]


def _stability(run: RunFolder, span: StageSpan) -> StageStability:
    def values(name: str) -> list[float]:
        return run.series(name, span)[1]

    accuracy, tpf, stage = values("rollout/accuracy"), values("rollout/tpf"), span.stage
    # The tables at the ends are of other problems.
    own = [e for e in run.evaluations if e["update"] in span.updates and e["during"]]
    held_out = [e["accuracy"] for e in own if e["block_size"] == stage.train_block]
    fall, measured = (held_out, "held-out") if len(held_out) > 1 else (accuracy, "rollout")
    return StageStability(
        name=stage.name,
        block=f"{stage.rollout_block}>{stage.train_block}" if stage.is_bridge else str(stage.train_block),
        updates=len(span.updates),
        first=accuracy[0],
        last=accuracy[-1],
        drawdown=drawdown(fall),
        drawdown_of=measured,
        kl_spikes=spikes(values("learner/kl")),
        grad_spikes=spikes(values("learner/grad_norm")),
        clip_fraction=_mean(values("learner/clip_fraction")),
        truncated=_mean(values("rollout/truncated")),
        drift=drift(accuracy, tpf),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
