"""The page of an experiment: several arms, each a list of runs that differ in their seed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from tstar_ray.analyze import StageAnalysis, analyze_stage
from tstar_ray.config import ConfigError
from tstar_ray.report import figures
from tstar_ray.report.page import changed_settings, render, save_figures, write_page
from tstar_ray.report.summary import block_scores, stability
from tstar_ray.report.theme import style
from tstar_ray.run_folder import RunFolder, read_run
from tstar_ray.scores import SeedSummary, over_seeds


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One arm at one block size."""

    arm: str
    """Its name."""
    block_size: int
    """B."""
    accuracy: SeedSummary
    """Held-out accuracy of the trained models."""
    tpf: SeedSummary
    """Their tokens per forward."""
    below_start: float
    """Share of seeds that ended below the start model."""


@dataclass(frozen=True, slots=True)
class ArmStability:
    """How one arm trained."""

    arm: str
    """Its name."""
    seeds: int
    """Runs."""
    ended: int
    """Those that have ended."""
    updates: float
    """Mean number of updates."""
    samples: float
    """Mean over seeds of the samples that were decoded and verified for training."""
    learner_tokens: float
    """Mean over seeds of the tokens the learner forwarded."""
    drawdown: float
    """Mean over seeds of the largest fall within any stage."""
    kl_spikes: float
    """Mean over seeds, all stages."""
    grad_spikes: float
    """The same of gradient norms."""
    alarms: int
    """Seeds with a stage that got faster but worse."""


def arm_rows(arms: Mapping[str, Sequence[RunFolder]]) -> list[ArmRow]:
    """Trained models of every arm at every block size they were evaluated at."""
    rows = []
    for arm, runs in arms.items():
        found = [row for run in runs for row in block_scores(run) if row.end]
        for block in sorted({row.block_size for row in found}):
            own = [(row.start, row.end) for row in found if row.block_size == block and row.end]
            rows.append(
                ArmRow(
                    arm=arm,
                    block_size=block,
                    accuracy=over_seeds([end.accuracy for _, end in own]),
                    tpf=over_seeds([end.tpf for _, end in own]),
                    below_start=fmean(end.accuracy < start.accuracy for start, end in own),
                )
            )
    return rows


def arm_stability(arms: Mapping[str, Sequence[RunFolder]]) -> list[ArmStability]:
    """Measures of algorithm reference 9.7 of every arm."""
    rows = []
    for arm, runs in arms.items():
        stages = [stability(run) for run in runs]
        rows.append(
            ArmStability(
                arm=arm,
                seeds=len(runs),
                ended=sum(run.result is not None for run in runs),
                updates=fmean(len(run.updates) for run in runs),
                samples=fmean(run.samples for run in runs),
                learner_tokens=fmean(sum(run.series("learner/forwarded_tokens")[1]) for run in runs),
                drawdown=fmean(max((s.drawdown for s in found), default=0.0) for found in stages),
                kl_spikes=fmean(sum(s.kl_spikes for s in found) for found in stages),
                grad_spikes=fmean(sum(s.grad_spikes for s in found) for found in stages),
                alarms=sum(any(s.alarm for s in found) for found in stages),
            )
        )
    return rows


def arm_settings(arms: Mapping[str, Sequence[RunFolder]]) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """What differs from the defaults: key and value where all arms agree, arm, key and value where they do not. The
    first run of an arm speaks for it; name, folder and seed are each run's own."""
    changed = {
        arm: {k: v for k, v in changed_settings(runs[0].config) if k not in ("run.name", "run.dir", "run.seed")}
        for arm, runs in arms.items()
    }
    shared = set.intersection(*(set(settings.items()) for settings in changed.values()))
    own = [(arm, k, v) for arm, settings in changed.items() for k, v in settings.items() if (k, v) not in shared]
    return sorted(shared), own


def first_schedules(runs: Sequence[RunFolder]) -> list[StageAnalysis]:
    """The stages of the first run that kept traces, at both ends only."""
    for run in runs:
        found = [analyze_stage(run, span, every_update=False) for span in run.stages]
        if any(found):
            return [stage for stage in found if stage]
    return []


def write_experiment_report(
    arms: Mapping[str, Sequence[Path]],
    folder: Path,
    *,
    title: str = "",
    said: Sequence[str] = (),
    drawn: Mapping[str, Callable[[], Figure]] | None = None,
) -> Path:
    """Write FOLDER/report.html and FOLDER/figures/ over run folders by arm; returns the page. Raises ConfigError.

    ``said``: what follows from the scores, line by line; ``drawn``: makes further figures, by name.
    """
    if not any(arms.values()):
        raise ConfigError("no run in any arm: there is nothing to report")
    runs = {arm: [read_run(path) for path in paths] for arm, paths in arms.items() if paths}
    folder.mkdir(parents=True, exist_ok=True)
    made = {"arms": figures.arms_over_updates(runs)}
    further = []
    for name, make in (drawn or {}).items():
        with style(name):
            made[name] = make()
        further.append(name)
    heat_maps = {}
    for index, (arm, own) in enumerate(runs.items()):
        if stages := first_schedules(own):
            heat_maps[arm] = f"heatmaps{index}"
            made[heat_maps[arm]] = figures.heat_maps(stages)
    shared, differing = arm_settings(runs)
    rows = arm_rows(runs)
    if rows:
        scores = {arm: [block_scores(run) for run in own] for arm, own in runs.items()}
        made["armspareto"] = figures.arms_pareto(scores)
    page = render(
        "experiment.html.j2",
        title=title or folder.name,
        arms=runs,
        said=said,
        further=further,
        heat_maps=heat_maps,
        shared=shared,
        differing=differing,
        links={run.folder: os.path.relpath(run.folder, folder) for own in runs.values() for run in own},
        rows=rows,
        stability=arm_stability(runs),
        figures=save_figures(made, folder / "figures"),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return write_page(folder / "report.html", page)
