"""What scores mean: intervals, pass@k, the accuracy-parallelism area, and how stable a training was. Pure functions.

verdicts of samples ──► mean with interval (problems are clusters), pass@k
(TPF, accuracy) of several settings ──► AUP, the frontier
accuracy and TPF over updates and seeds ──► drawdown, spikes, "faster but worse"
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964


def wilson_interval(successes: float, trials: float, z: float = _Z) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default; (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_interval(scores: Sequence[float], samples: int = 1, z: float = _Z) -> tuple[float, float]:
    """Interval of the mean of one score in [0, 1] a problem, each the mean of ``samples`` draws.

    Samples of one problem are alike, so they do not count as independent: the Wilson interval is taken at the number of
    independent samples that would have the same variance as the problems' means show (cluster-robust; Kish's design
    effect). With one sample a problem it is the plain Wilson interval.
    """
    n = len(scores)
    if n == 0:
        return 0.0, 1.0
    mean = sum(scores) / n
    variance = sum((s - mean) ** 2 for s in scores) / n**2
    # Between one independent sample a problem and all of them; where nothing varies, one a problem.
    effective = n if variance == 0 else min(max(mean * (1 - mean) / variance, n), n * samples)
    return wilson_interval(mean * effective, effective, z)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from ``correct`` of ``samples`` (Chen 2021)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must lie in 1..{samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def aup(points: Sequence[tuple[float, float]], *, best: float | None = None) -> float:
    """Accuracy under parallelism (d3LLM's definition): the area under accuracy (0 to 100) against TPF, points of low
    accuracy weighted down.

    ``points`` are (TPF, accuracy) of one method at several settings; ``best`` is the highest accuracy of all methods
    compared (None: of these points), so values of different comparisons do not compare. Sorted by TPF, points more than
    5 below the first are dropped; then ``tpf_1 y_1 + sum (tpf_i - tpf_(i-1)) (y_i W_i + y_(i-1) W_(i-1)) / 2`` with
    ``W = min(exp(-3 (1 - y / best)), 1)``.
    """
    if not points:
        raise ValueError("AUP of no points")
    ordered = sorted(points)
    kept = [(tpf, y) for tpf, y in ordered if y >= ordered[0][1] - 5]
    top = max(y for _, y in points) if best is None else best

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / top)), 1.0) if top > 0 else 0.0

    area = kept[0][0] * kept[0][1]
    for (tpf_a, y_a), (tpf_b, y_b) in itertools.pairwise(kept):
        area += (tpf_b - tpf_a) * (weighted(y_a) + weighted(y_b)) / 2
    return area


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both TPF and accuracy, by rising TPF."""
    best, kept = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept[::-1]


def drawdown(series: Sequence[float]) -> float:
    """Largest fall below the highest value so far; 0 for a series that never falls."""
    values = np.asarray(series, dtype=float)
    return float((np.maximum.accumulate(values) - values).max()) if len(values) else 0.0


def spikes(series: Sequence[float], factor: float = 5.0) -> int:
    """Values above ``factor`` times the median (algorithm reference 9.7)."""
    values = np.asarray(series, dtype=float)
    return int((values > factor * np.median(values)).sum()) if len(values) else 0


@dataclass(frozen=True, slots=True)
class Drift:
    """How accuracy and TPF moved between two windows of one stage."""

    accuracy: float
    """Last window minus first."""
    error: float
    """Standard error of that difference, from the spread inside the windows."""
    tpf_ratio: float
    """Last window over first."""

    @property
    def faster_but_worse(self) -> bool:
        """TPF rose by 2 % or more while accuracy fell by 2 points or more, and by two standard errors: how large-block
        training without a curriculum fails (LightningRL's table 1)."""
        return self.tpf_ratio >= 1.02 and self.accuracy <= -max(0.02, 2 * self.error)


def drift(accuracy: Sequence[float], tpf: Sequence[float], *, window: int = 5) -> Drift | None:
    """Between the first and the last ``window`` updates; None for fewer than two updates."""
    size = min(window, len(accuracy) // 2)
    if size == 0:
        return None
    first, last = np.asarray(accuracy[:size], dtype=float), np.asarray(accuracy[-size:], dtype=float)
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / size) if size > 1 else 0.0
    return Drift(
        accuracy=float(last.mean() - first.mean()),
        error=error,
        tpf_ratio=float(np.mean(tpf[-size:])) / max(float(np.mean(tpf[:size])), 1e-12),
    )


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """One number over the seeds of one arm."""

    mean: float
    """Over the seeds."""
    deviation: float
    """Sample standard deviation; NaN for one seed."""
    worst: float
    """Smallest."""
    seeds: int
    """How many."""


def over_seeds(values: Sequence[float]) -> SeedSummary:
    """Mean, deviation and worst of a score of which more is better."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("no seed to summarise")
    deviation = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
    return SeedSummary(float(array.mean()), deviation, float(array.min()), len(array))
