"""The figures of a report. Each returns a matplotlib figure drawn in `theme.style`; none touches a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tstar_ray.analyze import StageAnalysis, measured_samples
from tstar_ray.report.summary import BlockScores, Score
from tstar_ray.report.theme import GRID, HEAT, INK, MUTED, SERIES, style
from tstar_ray.run_folder import RunFolder
from tstar_ray.scores import frontier

CURVES = (
    ("Accuracy", "rollout/accuracy", True),
    ("Tokens per forward", "rollout/tpf", False),
    ("Reward", "rollout/reward", False),
    ("KL to the reference (nats)", "learner/kl", False),
    ("Entropy at the targets (nats)", "learner/entropy", False),
    ("Cut at the length cap", "rollout/truncated", True),
)
"""Title, number of an update's record, whether it is a share."""


def smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Centred running mean; shorter windows at the ends."""
    array = np.asarray(values, dtype=float)
    ones = np.ones(min(window, max(1, len(array))))
    return np.convolve(array, ones, "same") / np.convolve(np.ones_like(array), ones, "same")


def curves(run: RunFolder) -> Figure:
    """Six small panels over the updates, stages as bands, held-out scores as points with their intervals."""
    with style("curves"):
        figure = Figure(figsize=(10.5, 5.2), layout="constrained")
        for axes, (title, name, share) in zip(figure.subplots(2, 3).flat, CURVES):
            _bands(axes, run)
            for index, span in enumerate(run.stages):
                updates, values = run.series(name, span)
                if values:
                    colour = SERIES[index % len(SERIES)]
                    axes.plot(updates, values, color=colour, alpha=0.3, linewidth=1)
                    axes.plot(updates, smooth(values), color=colour)
            if name in ("rollout/accuracy", "rollout/tpf"):
                _held_out(axes, run, name.partition("/")[2])
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if share:
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.margins(x=0.02)
            if name in ("learner/kl", "rollout/truncated"):
                # Often zero throughout: show that as zero, not as noise around it.
                axes.set_ylim(0, max(0.01, axes.get_ylim()[1]))
        return figure


def _bands(axes: Axes, run: RunFolder) -> None:
    for index, span in enumerate(run.stages):
        first, last = span.updates[0] - 0.5, span.updates[-1] + 0.5
        if index % 2:
            axes.axvspan(first, last, color=GRID, alpha=0.45, linewidth=0)
        axes.annotate(
            span.stage.name,
            ((first + last) / 2, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=7,
            color=MUTED,
        )


def _held_out(axes: Axes, run: RunFolder, name: str) -> None:
    for index, span in enumerate(run.stages):
        own = [e for e in run.evaluations if e["update"] in span.updates and e["block_size"] == span.stage.train_block]
        if not own:
            continue
        x, y = [e["update"] for e in own], [e[name] for e in own]
        colour = SERIES[index % len(SERIES)]
        if name == "accuracy" and all("low" in e for e in own):
            errors = [[e["accuracy"] - e["low"] for e in own], [e["high"] - e["accuracy"] for e in own]]
            axes.errorbar(x, y, errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
        axes.plot(x, y, "o", color=colour, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)


def pareto(scores: Sequence[BlockScores]) -> Figure:
    """Accuracy against tokens per forward: hollow the start model, filled the trained one, an arrow for each block."""
    with style("pareto"):
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        axes = figure.subplots()
        for index, row in enumerate(scores):
            colour = SERIES[index % len(SERIES)]
            _point(axes, row.start, colour, filled=False)
            label, at = f"B={row.block_size}", row.end or row.start
            if row.end:
                _point(axes, row.end, colour, filled=True)
                axes.annotate(
                    "",
                    (row.end.tpf, 100 * row.end.accuracy),
                    (row.start.tpf, 100 * row.start.accuracy),
                    arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": 0.55, "shrinkA": 6, "shrinkB": 7},
                )
            axes.annotate(
                label,
                (at.tpf, 100 * at.accuracy),
                xytext=(8, 6),
                textcoords="offset points",
                fontsize=9,
                fontweight="bold",
                color=colour,
            )
        ends = [(r.end.tpf, 100 * r.end.accuracy) for r in scores if r.end]
        if len(ends) > 1:
            x, y = zip(*[ends[i] for i in frontier(ends)])
            axes.plot(x, y, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        axes.set_xlabel("tokens per forward (without commits)")
        axes.set_ylabel("held-out accuracy (%)")
        axes.plot([], [], "o", color=MUTED, markerfacecolor="none", label="start model")
        axes.plot([], [], "o", color=MUTED, label="trained model")
        axes.legend(loc="lower left", handletextpad=0.2)
        axes.margins(0.14)
        return figure


def _point(axes: Axes, score: Score, colour: str, *, filled: bool) -> None:
    y = 100 * score.accuracy
    errors = [[y - 100 * score.low], [100 * score.high - y]]
    if not np.isnan(errors).any():
        axes.errorbar(score.tpf, y, errors, fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.5)
    face = colour if filled else "none"
    axes.plot(score.tpf, y, "o", color=colour, markerfacecolor=face, markersize=8, markeredgewidth=1.6, zorder=3)


def heat_maps(stages: Sequence[StageAnalysis]) -> Figure:
    """When each position of a block is revealed: a column a stage, first updates above last ones."""
    with style("heatmaps"):
        figure = Figure(figsize=(min(10.5, 1.2 + 2.6 * len(stages)), 5.2), layout="constrained")
        if told := measured_samples(stages):
            figure.suptitle(told, fontsize=8, color=MUTED)
        grid = figure.subplots(2, len(stages), squeeze=False)
        for column, stage in enumerate(stages):
            for row, (schedule, when) in enumerate(((stage.start, "first"), (stage.end, "last"))):
                axes, heat = grid[row, column], np.array(schedule.heat_map)
                # Of the tokens at a position, the share of each step, so that rare positions show as well.
                heat = heat / np.maximum(heat.sum(axis=0, keepdims=True), 1e-12)
                used = max(2, int(np.flatnonzero(heat.max(axis=1) > 0.005).max(initial=0)) + 1)
                axes.imshow(heat[:used], origin="lower", cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="none")
                axes.grid(visible=False)
                axes.set_title(f"{stage.name}, {when} updates")
                axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
                if row:
                    axes.set_xlabel("position in the block")
                if not column:
                    axes.set_ylabel("step in the block")
        return figure


def schedule_lines(stages: Sequence[StageAnalysis]) -> Figure:
    """Four schedule measures over the updates."""
    panels = (
        ("Non-monotone reveals", "nonmono_rate"),
        ("Inverted pairs", "inversion_rate"),
        ("Distance to left-to-right", "js_left_to_right"),
        ("Distance to the stage's start", "js_stage_start"),
    )
    with style("schedule"):
        figure = Figure(figsize=(10.5, 2.6), layout="constrained")
        for axes, (title, name) in zip(figure.subplots(1, 4).flat, panels):
            for index, stage in enumerate(stages):
                values = [getattr(s, name) for s in stage.by_update]
                axes.plot(stage.updates, values, color=SERIES[index % len(SERIES)], label=stage.name)
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.axes[0].legend(loc="best")
        return figure


def arms_over_updates(arms: Mapping[str, Sequence[RunFolder]]) -> Figure:
    """Rollout accuracy and TPF of every arm: mean over seeds, band from the worst to the best."""
    with style("arms"):
        figure = Figure(figsize=(10.5, 3.8), layout="constrained")
        panels = (("Rollout accuracy", "rollout/accuracy"), ("Tokens per forward", "rollout/tpf"))
        for axes, (title, name) in zip(figure.subplots(1, 2).flat, panels):
            for index, (arm, runs) in enumerate(arms.items()):
                series = [smooth(run.series(name)[1]) for run in runs]
                length = min(map(len, series), default=0)
                if not length:
                    continue
                values = np.array([s[:length] for s in series])
                x, colour = np.arange(1, length + 1), SERIES[index % len(SERIES)]
                axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.16, linewidth=0)
                axes.plot(x, values.mean(axis=0), color=colour, label=f"{arm} ({len(runs)})")
            axes.set_title(title)
            axes.set_xlabel("update")
        figure.axes[0].legend(loc="best")
        return figure


def arms_pareto(arms: Mapping[str, Sequence[Sequence[BlockScores]]]) -> Figure:
    """Trained models of every arm and seed in the accuracy-TPF plane; large marks are means over seeds."""
    with style("armspareto"):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axes, starts = figure.subplots(), {}
        for index, (arm, seeds) in enumerate(arms.items()):
            colour, means = SERIES[index % len(SERIES)], []
            for block in sorted({row.block_size for seed in seeds for row in seed}):
                rows = [row for seed in seeds for row in seed if row.block_size == block]
                starts[block] = rows[0].start
                ends = [row.end for row in rows if row.end]
                if not ends:
                    continue
                x, y = [e.tpf for e in ends], [100 * e.accuracy for e in ends]
                axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.4, linestyle="none")
                means.append((float(np.mean(x)), float(np.mean(y)), block))
            if means:
                axes.plot(*zip(*[(x, y) for x, y, _ in means]), "o-", color=colour, markersize=8, label=arm)
            for tpf, accuracy, block in means:
                axes.annotate(f"{block}", (tpf, accuracy), (6, 5), textcoords="offset points", fontsize=8, color=colour)
        for block, score in starts.items():
            at = (score.tpf, 100 * score.accuracy)
            axes.plot(*at, "o", color=MUTED, markerfacecolor="none", markersize=8)
            axes.annotate(f"{block}", at, (6, -10), textcoords="offset points", fontsize=8, color=INK)
        axes.plot([], [], "o", color=MUTED, markerfacecolor="none", label="start model")
        axes.set_xlabel("tokens per forward (without commits)")
        axes.set_ylabel("held-out accuracy (%)")
        axes.legend(loc="best")
        axes.margins(0.1)
        return figure
