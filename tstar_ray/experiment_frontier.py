"""What an experiment's models do at other confidence thresholds: accuracy over tokens per forward, arm against arm.

    trained models x blocks x thresholds ──► Decoded ──► rows       mean, deviation, worst seed of each decoding
                                                    ├──► fastest    the most parallel decoding that keeps the accuracy
                                                    └──► gains      one arm's curve over another's, seed by seed

One threshold says little of two arms that differ in accuracy and in speed: what one has in one it can buy with the
other. Curves compare them where both reach. NumPy and plain dictionaries only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tstar_ray.experiment_summary import Row, over_seeds

KEEP = 0.97
"""Share of the reference's accuracy that T* is to keep."""
_POINTS = 101


@dataclass(frozen=True, slots=True)
class Decoded:
    """One model decoded one way."""

    arm: str
    """Key of its arm."""
    seed: int
    """run.seed."""
    block: int
    """Block size of decoding."""
    threshold: float
    """Confidence above which tokens are revealed."""
    accuracy: float
    """Held out."""
    tpf: float
    """Tokens per forward, without commits."""
    tpf_with_commits: float
    """With a commit pass for every block."""
    truncated: float
    """Share of completions cut at the cap."""


@dataclass(frozen=True, slots=True)
class FrontierRow(Row):
    """One arm decoded one way, over its seeds."""

    threshold: float
    """Confidence threshold."""


def frontier_rows(decoded: Sequence[Decoded]) -> list[FrontierRow]:
    """Arms in order of appearance, blocks and thresholds ascending."""
    found = []
    for arm in dict.fromkeys(d.arm for d in decoded):
        for block, threshold in sorted({(d.block, d.threshold) for d in decoded if d.arm == arm}):
            mine = [asdict(d) for d in decoded if (d.arm, d.block, d.threshold) == (arm, block, threshold)]
            found.append(FrontierRow(arm=arm, block=block, threshold=threshold, **over_seeds(mine)))
    return found


def fastest(rows: Sequence[FrontierRow], arm: str, reference: dict[str, float], own: float) -> dict[str, Any] | None:
    """An arm's most parallel decoding at its largest block whose mean accuracy is at least `KEEP` of a reference's.

    ``reference``: accuracy, tpf, tpf_with_commits. ``own``: the arm's own accuracy at its smallest block, for
    ``own_kept``. None where no decoding keeps the reference's.
    """
    mine = [row for row in rows if row.arm == arm]
    top = [row for row in mine if row.block == max(r.block for r in mine)]
    able = [row for row in top if row.accuracy >= KEEP * reference["accuracy"]]
    if not able:
        return None
    best = max(able, key=lambda row: row.tpf)
    return {
        **asdict(best),
        "accuracy_kept": best.accuracy / reference["accuracy"],
        "worst_kept": best.accuracy_worst / reference["accuracy"],
        "own_kept": best.accuracy / max(own, 1e-9),
        "tpf_multiple": best.tpf / reference["tpf"],
        "tpf_with_commits_multiple": best.tpf_with_commits / reference["tpf_with_commits"],
    }


def gain(decoded: Sequence[Decoded], arm: str, other: str, block: int) -> dict[str, Any] | None:
    """How far one arm's curve of accuracy over TPF lies above another's at one block size.

    For every seed that both have: the mean difference of the two curves, linear between thresholds, over the TPF that
    both reach. None where no seed has such a range.
    """
    gains = []
    for seed in sorted({d.seed for d in decoded}):
        mine, theirs = (_curve(decoded, name, seed, block) for name in (arm, other))
        if mine is None or theirs is None:
            continue
        low, high = max(mine[0][0], theirs[0][0]), min(mine[0][-1], theirs[0][-1])
        if low < high:
            at = np.linspace(low, high, _POINTS)
            gains.append(float((np.interp(at, *mine) - np.interp(at, *theirs)).mean()))
    if not gains:
        return None
    return {
        "arm": arm,
        "other": other,
        "block": block,
        "mean_gain": float(np.mean(gains)),
        "least_gain": float(np.min(gains)),
        "wins": sum(g > 0 for g in gains),
        "pairs": len(gains),
    }


def _curve(decoded: Sequence[Decoded], arm: str, seed: int, block: int) -> tuple[np.ndarray, np.ndarray] | None:
    """TPF ascending, and accuracy there."""
    points = sorted((d.tpf, d.accuracy) for d in decoded if (d.arm, d.seed, d.block) == (arm, seed, block))
    if not points:
        return None
    tpf, accuracy = zip(*points)
    return np.array(tpf), np.array(accuracy)


def frontier(decoded: Sequence[Decoded], reference: dict[str, float], own: Mapping[str, float]) -> dict[str, Any]:
    """Everything, for JSON; arms are compared at the largest block. ``own``: `experiment_summary.own_accuracies`."""
    rows = frontier_rows(decoded)
    arms = list(dict.fromkeys(row.arm for row in rows))
    top = max((row.block for row in rows), default=0)
    pairs = [gain(decoded, a, b, top) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return {
        "rows": [asdict(row) for row in rows],
        "fastest": {arm: fastest(rows, arm, reference, own[arm]) for arm in arms},
        "gains": [pair for pair in pairs if pair],
    }


def frontier_markdown(found: dict[str, Any], labels: dict[str, str]) -> str:
    """The largest block at every threshold as Markdown, and what follows from it."""
    top = max((row["block"] for row in found["rows"]), default=0)
    rows = [row for row in found["rows"] if row["block"] == top]
    thresholds = sorted({row["threshold"] for row in rows})
    cells = {(row["arm"], row["threshold"]): row for row in rows}
    lines = [f"B={top} at other thresholds: accuracy, TPF (with commits)", ""]
    lines += ["| arm | " + " | ".join(f"{t:g}" for t in thresholds) + " |", "|---|" + "---|" * len(thresholds)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        told = []
        for threshold in thresholds:
            row = cells.get((arm, threshold))
            told.append(f"{row['accuracy']:.1%}, {row['tpf']:.2f} ({row['tpf_with_commits']:.2f})" if row else "")
        lines.append(f"| {labels.get(arm, arm)} | " + " | ".join(told) + " |")
    lines.append("")
    for arm, best in found["fastest"].items():
        if best is None:
            lines.append(f"- {labels.get(arm, arm)}: no decoding at B={top} keeps {KEEP:.0%} of the accuracy")
        else:
            lines.append(
                f"- {labels.get(arm, arm)} at B={top} and {best['threshold']:g}: {best['accuracy_kept']:.1%} of the "
                f"reference's accuracy (worst seed {best['worst_kept']:.1%}) at {best['tpf_multiple']:.2f} times its "
                f"TPF, with commits {best['tpf_with_commits_multiple']:.2f} times; {best['own_kept']:.1%} of the arm's "
                "own at its smallest block"
            )
    for pair in found["gains"]:
        arm, other = (labels.get(pair[side], pair[side]) for side in ("arm", "other"))
        lines.append(
            f"- {arm} against {other} at equal TPF: {100 * pair['mean_gain']:+.1f} points on the mean, "
            f"{100 * pair['least_gain']:+.1f} on the seed that gains least, better on {pair['wins']} of {pair['pairs']}"
        )
    return "\n".join(lines) + "\n"
