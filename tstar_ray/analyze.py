"""How the decoding schedule changed: every measure of `tstar_ray.schedule`, stage by stage.

    python -m tstar_ray.analyze runs/NAME             first against last updates of every stage
    python -m tstar_ray.analyze evaluations/NAME      every cell, and what forcing another reveal order costs

Reads the traces that a run or an evaluation kept, prints a table, and writes analysis.json beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tstar_ray.config import ConfigError
from tstar_ray.grid import CellResult, read_results
from tstar_ray.run_folder import Alike, RunFolder, StageSpan, decoded_alike, read_reveals, read_run
from tstar_ray.schedule import Schedule, heat_map, measure

_WINDOW = 3
"""Updates at either end of a stage whose trajectories are measured together."""
_COLUMNS = (
    ("tokens/\nstep", "tokens_per_step"),
    ("non-\nmono", "nonmono_rate"),
    ("tau-b", "kendall_tau"),
    ("inver-\nted", "inversion_rate"),
    ("an-\nchors", "anchor_rate"),
    ("JS to\nL-to-R", "js_left_to_right"),
    ("JS to\nb=4", "js_sub_blocks"),
    ("JS to\nstart", "js_stage_start"),
)


@dataclass(frozen=True, slots=True)
class StageAnalysis:
    """One stage of a run."""

    name: str
    """Of the stage."""
    block_size: int
    """Rollout block, at which its schedules are seen."""
    updates: tuple[int, ...]
    """Updates with traces."""
    alike: Alike | None
    """The samples measured, where the stage decoded some otherwise than others; None: all."""
    start: Schedule
    """Over the first updates."""
    end: Schedule
    """Over the last ones; its ``js_stage_start`` compares the two."""
    by_update: tuple[Schedule, ...]
    """One for each of ``updates`` if they were asked for; ``js_stage_start`` to the stage's first updates."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; heat-maps of start and end only."""
        brief = [{k: v for k, v in s.to_dict().items() if k != "heat_map"} for s in self.by_update]
        return {
            "name": self.name,
            "block_size": self.block_size,
            "updates": self.updates,
            "samples": str(self.alike or "all"),
            "start": self.start.to_dict(),
            "end": self.end.to_dict(),
            "by_update": brief,
        }


@dataclass(frozen=True, slots=True)
class OrderEffect:
    """What a forced reveal order does to accuracy and speed, against the learned one in the same cell."""

    learned: str
    """Key of the learned cell."""
    order: str
    """The forced order."""
    accuracy: float
    """Difference in accuracy, forced minus learned."""
    error: float
    """Its standard error, over problems in pairs."""
    tpf: float
    """Difference in TPF."""


def analyze_run(run: RunFolder) -> list[StageAnalysis]:
    """All stages that kept traces."""
    return [found for found in (analyze_stage(run, span) for span in run.stages) if found]


def analyze_stage(run: RunFolder, span: StageSpan, *, every_update: bool = True) -> StageAnalysis | None:
    """None where it kept no traces. ``every_update``: measure each, or both ends of the stage only."""
    updates = tuple(u for u in span.updates if run.traces(u))
    if not updates:
        return None
    block, window = span.stage.rollout_block, max(1, min(_WINDOW, len(updates) // 2))
    alike = decoded_alike(run.config, span.stage)
    first, last = run.reveals(updates[:window], block, alike), run.reveals(updates[-window:], block, alike)
    assert first is not None, "traces are there"
    assert last is not None, "traces are there"
    reference = heat_map(first)
    by_update = []
    for update in updates if every_update else ():
        reveals = run.reveals([update], block, alike)
        assert reveals is not None, "traces are there"
        by_update.append(measure(reveals, stage_start=reference))
    return StageAnalysis(
        name=span.stage.name,
        block_size=block,
        updates=updates,
        alike=alike,
        start=measure(first),
        end=measure(last, stage_start=reference),
        by_update=tuple(by_update),
    )


def measured_samples(stages: Sequence[StageAnalysis]) -> str:
    """Which samples were measured, where that is not all; empty otherwise."""
    told = {stage.name: str(stage.alike) for stage in stages if stage.alike}
    if len(told) == len(stages) and len(set(told.values())) == 1:
        return f"samples: {next(iter(told.values()))}"
    return "; ".join(f"samples of {name}: {alike}" for name, alike in told.items())


def analyze_evaluation(folder: Path) -> list[tuple[CellResult, Schedule]]:
    """Every cell of an evaluation that kept its traces."""
    found = []
    for result in read_results(folder):
        path = folder / "traces" / f"{result.key}.parquet"
        if path.is_file():
            found.append((result, measure(read_reveals([path], result.cell.decoding.block_size))))
    return found


def order_effects(results: Sequence[CellResult]) -> list[OrderEffect]:
    """Forced against learned order, for cells that agree in all else; over the problems that both have scored, each
    compared with itself."""
    effects = []
    for forced in (r for r in results if r.cell.decoding.order != "learned"):
        twin = replace(forced.cell, decoding=replace(forced.cell.decoding, order="learned"))
        for learned in (r for r in results if r.cell == twin):
            a, b = (dict(zip(r.scored, r.correct)) for r in (forced, learned))
            differences = [(a[i] - b[i]) / forced.cell.samples for i in a.keys() & b.keys()]
            n = len(differences)
            if not n:
                continue
            mean = sum(differences) / n
            spread = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
            effects.append(
                OrderEffect(
                    learned=learned.key,
                    order=forced.cell.decoding.order,
                    accuracy=mean,
                    error=math.sqrt(spread / n),
                    tpf=forced.tpf - learned.tpf,
                )
            )
    return effects


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 nothing to analyze."""
    parser = argparse.ArgumentParser(
        prog="python -m tstar_ray.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a run or an evaluation")
    folder = parser.parse_args(argv).folder
    console = Console()
    try:
        if (folder / "metrics.jsonl").is_file():
            document = _report_run(folder, console)
        else:
            document = _report_evaluation(folder, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = folder / "analysis.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False))
    console.print(f"written: {path}", highlight=False)
    return 0


def _report_run(folder: Path, console: Console) -> dict[str, Any]:
    run = read_run(folder)
    stages = analyze_run(run)
    if not stages:
        raise ConfigError(f"{folder}: no traces/update-*.parquet; the run needs run.save_traces=true")
    table = _table(f"{run.name}: decoding schedule, first and last updates of each stage", "updates")
    for stage in stages:
        window = max(1, min(_WINDOW, len(stage.updates) // 2))
        ends = ((stage.updates[:window], stage.start), (stage.updates[-window:], stage.end))
        for updates, schedule in ends:
            table.add_row(f"{stage.name} {_span(updates)}", *_cells(schedule), end_section=schedule is stage.end)
    table.caption = measured_samples(stages)
    console.print(table)
    return {"run": run.name, "stages": [stage.to_dict() for stage in stages]}


def _report_evaluation(folder: Path, console: Console) -> dict[str, Any]:
    cells = analyze_evaluation(folder)
    if not cells:
        raise ConfigError(f"{folder}: the evaluation kept no traces; it needs save_traces=true")
    # What all cells share is said once.
    labels_of = [result.cell.label.split(", ") for result, _ in cells]
    common = [part for part in labels_of[0] if len(cells) > 1 and all(part in label for label in labels_of)]

    def short(label: str) -> str:
        return ", ".join(part for part in label.split(", ") if part not in common)

    table = _table(f"{folder.name}: decoding schedule of each cell", "cell")
    for result, schedule in cells:
        table.add_row(short(result.cell.label), *_cells(schedule))
    table.caption = ", ".join(common)
    console.print(table)
    effects = order_effects([result for result, _ in cells])
    labels = {result.key: result.cell.label for result, _ in cells}
    if effects:
        forced = Table(title="Forced reveal orders against the learned one", box=SIMPLE_HEAD)
        for name in ("cell", "order", "accuracy", "TPF"):
            forced.add_column(name)
        for e in effects:
            change = f"{100 * e.accuracy:+.1f} points (s.e. {100 * e.error:.1f})"
            forced.add_row(short(labels[e.learned]), e.order.replace("_", " "), change, f"{e.tpf:+.2f}")
        console.print(forced)
    return {
        "cells": [{"key": r.key, "label": r.cell.label, "schedule": s.to_dict()} for r, s in cells],
        "orders": [
            {"learned": e.learned, "order": e.order, "accuracy": e.accuracy, "error": e.error, "tpf": e.tpf}
            for e in effects
        ],
    }


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=14)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(schedule: Schedule) -> list[str]:
    values = [getattr(schedule, name) for _, name in _COLUMNS]
    return ["-" if v is None or math.isnan(v) else f"{v:.3f}" for v in values]


def _span(updates: Sequence[int]) -> str:
    return f"{updates[0]}" if len(updates) == 1 else f"{updates[0]}-{updates[-1]}"


if __name__ == "__main__":
    sys.exit(main())
