"""Tables of an experiment from the results of its runs. NumPy and plain dictionaries only.

    cells (arm x seed) ──► rows: arm x block size over seeds          mean, deviation, worst seed
                       ──► budgets: what an arm spent                 samples and learner tokens
                       ──► comparisons: one arm against another       on the mean, on the worst seed, at equal tokens

Deviations are those of the sample (n - 1) over seeds; they hold training noise, and with it the choice of problems. The
held-out problems are the same for all, so that differences between arms are not those of problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class CellResult:
    """One run that ended."""

    arm: str
    """Key of its arm."""
    seed: int
    """run.seed."""
    evaluations: list[dict[str, Any]]
    """End table: one `tstar_ray.evaluate.Evaluation` for each block size."""
    budget: dict[str, float] = field(default_factory=dict)
    """What it spent (`tstar_ray.budget.KEYS`); empty for the start model."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """`tstar_ray.budget.read_curve`."""
    updates: int = 0
    """Updates made."""


@dataclass(frozen=True, slots=True)
class Row:
    """One arm decoded at one block size, over its seeds."""

    arm: str
    """Key of the arm."""
    block: int
    """Block size of decoding."""
    seeds: int
    """Runs that ended."""
    accuracy: float
    """Mean over seeds."""
    accuracy_sd: float
    """Standard deviation over seeds; 0 where there is one."""
    accuracy_worst: float
    """Of the worst seed."""
    tpf: float
    """Mean tokens per forward, without commits."""
    tpf_sd: float
    """Its standard deviation."""
    tpf_with_commits: float
    """Mean with a commit pass for every block."""
    truncated: float
    """Mean share of completions cut at the cap."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another at one block size."""

    arm: str
    """Key."""
    other: str
    """Key."""
    block: int
    """Block size of decoding."""
    mean_gain: float
    """Difference of mean accuracies."""
    worst_gain: float
    """Difference of the worst seeds' accuracies."""
    wins: int
    """Seeds on which the arm is better."""
    pairs: int
    """Seeds that both have."""
    equal_tokens_gain: float | None
    """Difference of mean accuracies at equal learner tokens: the most at which both were evaluated during training, on
    the same problems, at that block; linear between evaluations. None where a seed has no such budget."""
    equal_tokens: float | None
    """Those tokens, mean over seeds."""


def rows(cells: Sequence[CellResult]) -> list[Row]:
    """Arms in order of appearance, blocks ascending."""
    found = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        mine = [cell for cell in cells if cell.arm == arm]
        for block in sorted({e["decoding"]["block_size"] for cell in mine for e in cell.evaluations}):
            scores = [e for cell in mine for e in cell.evaluations if e["decoding"]["block_size"] == block]
            found.append(Row(arm=arm, block=block, **over_seeds(scores)))
    return found


def over_seeds(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a `Row` says of scores (accuracy, tpf, tpf_with_commits, truncated), one for each seed."""
    accuracy, tpf = (np.array([score[name] for score in scores]) for name in ("accuracy", "tpf"))
    return {
        "seeds": len(scores),
        "accuracy": float(accuracy.mean()),
        "accuracy_sd": _deviation(accuracy),
        "accuracy_worst": float(accuracy.min()),
        "tpf": float(tpf.mean()),
        "tpf_sd": _deviation(tpf),
        "tpf_with_commits": float(np.mean([score["tpf_with_commits"] for score in scores])),
        "truncated": float(np.mean([score["truncated"] for score in scores])),
    }


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def budgets(cells: Sequence[CellResult]) -> dict[str, dict[str, float]]:
    """Mean over seeds of what each arm spent, and its updates."""
    found: dict[str, dict[str, float]] = {}
    for arm in dict.fromkeys(cell.arm for cell in cells):
        mine = [cell for cell in cells if cell.arm == arm and cell.budget]
        if mine:
            means = {name: float(np.mean([cell.budget[name] for cell in mine])) for name in mine[0].budget}
            found[arm] = {"updates": float(np.mean([cell.updates for cell in mine]))} | means
    return found


def compare(cells: Sequence[CellResult], arm: str, other: str, block: int) -> Comparison | None:
    """None where they have no seed in common at that block."""
    mine, theirs = (
        {
            cell.seed: (e["accuracy"], cell)
            for cell in cells
            for e in cell.evaluations
            if cell.arm == name and e["decoding"]["block_size"] == block
        }
        for name in (arm, other)
    )
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    a, b = (np.array([found[seed][0] for seed in seeds]) for found in (mine, theirs))
    equal = [at_equal_tokens(mine[seed][1].curve, theirs[seed][1].curve, block) for seed in seeds]
    gains = [(tokens, x - y) for tokens, x, y in filter(None, equal)]
    complete = len(gains) == len(seeds)
    return Comparison(
        arm=arm,
        other=other,
        block=block,
        mean_gain=float((a - b).mean()),
        worst_gain=float(a.min() - b.min()),
        wins=int((a > b).sum()),
        pairs=len(seeds),
        equal_tokens_gain=float(np.mean([gain for _, gain in gains])) if complete else None,
        equal_tokens=float(np.mean([tokens for tokens, _ in gains])) if complete else None,
    )


def at_equal_tokens(
    curve: Sequence[dict[str, float]], other: Sequence[dict[str, float]], block: int
) -> tuple[float, float, float] | None:
    """The largest number of learner tokens that both curves (`budget.read_curve`) reach at a block size, and the
    accuracy of each there, linear between evaluations during training; None where they have no range in common."""
    sides = []
    for points in (curve, other):
        own = [(p["learner_tokens"], p["accuracy"]) for p in points if p["block"] == block and p["during"]]
        if not own:
            return None
        sides.append(tuple(zip(*own)))
    (tokens, accuracy), (other_tokens, other_accuracy) = sides
    most = min(tokens[-1], other_tokens[-1])
    if most < max(tokens[0], other_tokens[0]):
        return None
    return most, float(np.interp(most, tokens, accuracy)), float(np.interp(most, other_tokens, other_accuracy))


def kept(table: Sequence[Row], arm: str, reference: str) -> dict[str, float] | None:
    """An arm at its largest block against the reference at its smallest: share of its accuracy, multiple of its TPF.
    ``own_kept``: the share of what the arm itself has at its smallest block."""
    mine = [row for row in table if row.arm == arm]
    base = [row for row in table if row.arm == reference]
    if not mine or not base:
        return None
    top, own, start = max(mine, key=_block), min(mine, key=_block), min(base, key=_block)
    return {
        "block": top.block,
        "reference_block": start.block,
        "accuracy_kept": top.accuracy / max(start.accuracy, 1e-9),
        "worst_kept": top.accuracy_worst / max(start.accuracy, 1e-9),
        "own_block": own.block,
        "own_kept": top.accuracy / max(own.accuracy, 1e-9),
        "tpf_multiple": top.tpf / start.tpf,
        "tpf_with_commits_multiple": top.tpf_with_commits / start.tpf_with_commits,
    }


def _block(row: Row) -> int:
    return row.block


def own_accuracies(table: Sequence[Row]) -> dict[str, float]:
    """Of every arm, its mean accuracy at its smallest block."""
    return {row.arm: row.accuracy for row in sorted(table, key=_block, reverse=True)}


def summary(cells: Sequence[CellResult], reference: str) -> dict[str, Any]:
    """Everything, for JSON."""
    table = rows(cells)
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    top = max((row.block for row in table), default=0)
    pairs = [compare(cells, a, b, top) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return {
        "rows": [asdict(row) for row in table],
        "budgets": budgets(cells),
        "kept": {arm: found for arm in arms if arm != reference and (found := kept(table, arm, reference))},
        "comparisons": [asdict(pair) for pair in pairs if pair],
    }


def markdown(found: dict[str, Any], labels: dict[str, str]) -> str:
    """The tables as Markdown."""
    lines = [
        "| arm | B | accuracy (mean ± sd) | worst seed | TPF | TPF with commits | cut | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        lines.append(
            f"| {labels.get(r['arm'], r['arm'])} | {r['block']} | {r['accuracy']:.1%} ± {r['accuracy_sd']:.1%} | "
            f"{r['accuracy_worst']:.1%} | {r['tpf']:.2f} ± {r['tpf_sd']:.2f} | {r['tpf_with_commits']:.2f} | "
            f"{r['truncated']:.1%} | {r['seeds']} |"
        )
    lines += ["", "| arm | updates | samples | trained on | learner tokens | train s | rollout s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for arm, spent in found["budgets"].items():
        lines.append(
            f"| {labels.get(arm, arm)} | {spent['updates']:.0f} | {spent['samples']:,.0f} | "
            f"{spent['trained_samples']:,.0f} | {spent['learner_tokens']:,.0f} | {spent['train_seconds']:.0f} | "
            f"{spent['rollout_seconds']:.0f} |"
        )
    lines.append("")
    for arm, k in found["kept"].items():
        lines.append(
            f"- {labels.get(arm, arm)} at B={k['block']}: {k['accuracy_kept']:.1%} of the reference's accuracy at "
            f"B={k['reference_block']} (worst seed {k['worst_kept']:.1%}), {k['tpf_multiple']:.2f} times its TPF; "
            f"{k['own_kept']:.1%} of its own at B={k['own_block']}"
        )
    for c in found["comparisons"]:
        equal = c["equal_tokens_gain"]
        lines.append(
            f"- {labels.get(c['arm'], c['arm'])} against {labels.get(c['other'], c['other'])} at B={c['block']}: "
            f"{100 * c['mean_gain']:+.1f} points on the mean, {100 * c['worst_gain']:+.1f} on the worst seed, "
            f"better on {c['wins']} of {c['pairs']} seeds"
            + ("" if equal is None else f"; {100 * equal:+.1f} points at {c['equal_tokens']:,.0f} learner tokens each")
        )
    return "\n".join(lines) + "\n"
