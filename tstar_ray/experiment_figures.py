"""Figures of an experiment as PNG and SVG: accuracy against tokens per forward, by block size and by confidence
threshold, and held-out accuracy on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette, told apart by everybody."""
_MARKERS = "osD^vPX*"


def draw(folder: Path, found: dict[str, Any], cells: Sequence[Any], labels: dict[str, str]) -> list[Path]:
    """Write each of `figures` as NAME.png and NAME.svg."""
    return [path for name, make in figures(found, cells, labels).items() for path in _save(make(), folder / name)]


def figures(found: dict[str, Any], cells: Sequence[Any], labels: dict[str, str]) -> dict[str, Callable[[], Figure]]:
    """What draws pareto, curves and, where models were decoded at several thresholds, frontier, from
    `experiment_summary.summary` and the cells it is of; in the style that holds when it is called."""
    arms = list(dict.fromkeys(row["arm"] for row in found["rows"]))
    style = {arm: (COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, arm in enumerate(arms)}
    title = "Accuracy against parallelism; numbers are block sizes, bars one standard deviation over seeds"
    made: dict[str, Callable[[], Figure]] = {
        "pareto": partial(_pareto, found["rows"], "block", title, style, labels),
        "curves": partial(_curves, cells, style, labels),
    }
    if "frontier" in found:
        rows = found["frontier"]["rows"]
        top = max(row["block"] for row in rows)
        title = f"B={top}; numbers are confidence thresholds, bars one standard deviation over seeds"
        rows = [row for row in rows if row["block"] == top]
        made["frontier"] = partial(_pareto, rows, "threshold", title, style, labels)
    return made


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in paths:
        figure.savefig(target, dpi=160, bbox_inches="tight")
    return paths


def _pareto(
    rows: Sequence[dict[str, Any]], number: str, title: str, style: dict[str, tuple[str, str]], labels: dict[str, str]
) -> Figure:
    """``number``: what tells the points of an arm apart."""
    figure = Figure(figsize=(7.2, 4.8))
    axes = figure.add_subplot()
    for arm, (colour, marker) in style.items():
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r[number])
        if not mine:
            continue
        axes.errorbar(
            [r["tpf"] for r in mine],
            [100 * r["accuracy"] for r in mine],
            xerr=[r["tpf_sd"] for r in mine],
            yerr=[100 * r["accuracy_sd"] for r in mine],
            label=labels.get(arm, arm),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
        for r in mine:
            axes.annotate(
                f"{r[number]:g}",
                (r["tpf"], 100 * r["accuracy"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
    _dress(axes, "tokens per forward (without commits)", "held-out accuracy, %")
    axes.set_title(title)
    axes.title.set_fontsize(8)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _curves(cells: Sequence[Any], style: dict[str, tuple[str, str]], labels: dict[str, str]) -> Figure:
    """Accuracy and TPF at the largest block that was evaluated so far, against samples and learner tokens."""
    figure = Figure(figsize=(10, 7))
    grid = figure.subplots(2, 2, sharex="col")
    for arm, (colour, marker) in style.items():
        curves = [_leading(cell.curve) for cell in cells if cell.arm == arm and cell.curve]
        for column, spent in enumerate(("samples", "learner_tokens")):
            for row, value in enumerate(("accuracy", "tpf")):
                axes: Axes = grid[row][column]
                scale = 100 if value == "accuracy" else 1
                for i, curve in enumerate(curves):
                    axes.plot(
                        [p[spent] for p in curve],
                        [scale * p[value] for p in curve],
                        color=colour,
                        alpha=0.35 if len(curves) > 1 else 1,
                        linewidth=1,
                        marker=marker,
                        markersize=2,
                        label=labels.get(arm, arm) if i == 0 and len(curves) == 1 else None,
                    )
                if len(curves) > 1:
                    count = min(map(len, curves))
                    axes.plot(
                        np.mean([[p[spent] for p in curve[:count]] for curve in curves], axis=0),
                        scale * np.mean([[p[value] for p in curve[:count]] for curve in curves], axis=0),
                        color=colour,
                        marker=marker,
                        markersize=4,
                        linewidth=1.8,
                        label=labels.get(arm, arm),
                    )
    for row, name in enumerate(("held-out accuracy, %", "tokens per forward")):
        _dress(grid[row][0], "", name)
        _dress(grid[row][1], "", "")
    grid[1][0].set_xlabel("samples rolled out")
    grid[1][1].set_xlabel("learner tokens")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle("At the block size in training; thin lines are seeds", fontsize=9)
    return figure


def _leading(curve: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """One evaluation of each update. Of the tables at the ends, which have every block size: the size that training
    begins with, and the largest."""
    updates = sorted({p["update"] for p in curve})
    of = {u: {p["block"]: p for p in curve if p["update"] == u} for u in updates}
    during = [next(iter(found.values())) for u, found in of.items() if len(found) == 1]
    first = of[updates[0]]
    begin = first.get(during[0]["block"] if during else max(first), first[max(first)])
    return [
        begin,
        *(p for p in during if p is not begin),
        *([of[updates[-1]][max(of[updates[-1]])]] if updates[1:] else []),
    ]


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
