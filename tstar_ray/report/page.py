"""The page of one run: numbers, figures and traces poured into the template."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from tstar_ray.analyze import analyze_run, measured_samples
from tstar_ray.config import Config, ConfigError
from tstar_ray.report import figures, theme
from tstar_ray.report.summary import block_scores, stability
from tstar_ray.report.viewer import load_decoder, viewer_data
from tstar_ray.run_folder import RunFolder, read_run


def write_run_report(folder: Path, *, traces: bool = True) -> Path:
    """Write RUN/report.html and RUN/figures/; returns the page. ``traces``: with schedules and the viewer, which read
    the trajectories. Raises ConfigError where there is no run, or no update yet."""
    run = read_run(folder)
    if not run.updates:
        raise ConfigError(f"{folder}: the run has made no update yet; there is nothing to report")
    stages = analyze_run(run) if traces else []
    scores = block_scores(run)
    made = {"curves": figures.curves(run)}
    if scores:
        made["pareto"] = figures.pareto(scores)
    if stages:
        made |= {"heatmaps": figures.heat_maps(stages), "schedule": figures.schedule_lines(stages)}
    decode, note = load_decoder(run.config.model)
    viewer = viewer_data(run, decode) if traces else {"texts": [], "updates": []}
    page = render(
        "run.html.j2",
        run=run,
        scores=scores,
        stages=stability(run),
        schedules=stages,
        measured=measured_samples(stages),
        figures=save_figures(made, folder / "figures"),
        viewer=viewer,
        note=note,
        settings=run.config.to_yaml(),
        changed=changed_settings(run.config),
        headline=_headline(run),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return write_page(folder / "report.html", page)


def save_figures(made: Mapping[str, Figure], folder: Path) -> dict[str, Markup]:
    """Write the figures as SVG and PNG; returns them for the page."""
    return {name: Markup(theme.inline(theme.save(figure, name, folder), name)) for name, figure in made.items()}


def render(template: str, **values: Any) -> str:
    """Fill a template; text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "script_json": _script_json}
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Replace a page as a whole."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def changed_settings(config: Config) -> list[tuple[str, str]]:
    """Settings that differ from the defaults, as key and value."""

    def walk(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
        found = []
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(defaults.get(name), dict):
                found += walk(value, defaults[name], f"{prefix}{name}.")
            elif value != defaults.get(name):
                found.append((prefix + name, json.dumps(value)))
        return found

    return walk(config.model_dump(mode="json"), Config().model_dump(mode="json"), "")


def _headline(run: RunFolder) -> list[tuple[str, str]]:
    """A few facts for the top of the page."""
    seconds = sum(r.get("seconds/update", 0.0) for r in run.updates)
    curriculum = run.config.curriculum
    return [
        ("model", run.config.model.path),
        ("curriculum", "stages" if curriculum.stages else curriculum.mode),
        ("blocks", " → ".join(dict.fromkeys(str(s.stage.train_block) for s in run.stages))),
        ("updates", str(len(run.updates))),
        ("samples", f"{run.samples:,}"),
        ("time in updates", f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"),
        ("seed", str(run.config.run.seed)),
    ]


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
