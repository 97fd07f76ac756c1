"""Figures of a stage that has just ended, while the run goes on."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from tstar_ray.analyze import analyze_stage
from tstar_ray.report import figures
from tstar_ray.run_folder import read_run


def stage_figures(folder: Path, name: str) -> dict[str, Figure]:
    """Curves of the run so far, and, where traces are kept, the reveal heat-maps of the stage of this name."""
    run = read_run(folder)
    span = next(span for span in reversed(run.stages) if span.stage.name == name)
    made = {"curves": figures.curves(run)}
    # Only both ends of the stage are read: a long one has gigabytes of traces.
    schedules = analyze_stage(run, span, every_update=False)
    if schedules:
        made["reveals"] = figures.heat_maps([schedules])
    return made
