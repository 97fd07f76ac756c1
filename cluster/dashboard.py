"""The Grafana dashboard of runs, as JSON that Ray's own Grafana set-up loads.

    python -m cluster.dashboard          writes cluster/grafana/tstar_ray.json

`PANELS` is all there is to it: a title, a unit and the queries, one row a line. A test sends every query to a
Prometheus that scrapes a run, and compares the file with what this makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("grafana") / "tstar_ray.json"
_WIDTH, _HEIGHT = 24, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    """What it shows."""
    queries: dict[str, str]
    """Legend -> PromQL; ``$run`` stands for the runs chosen at the top."""
    unit: str = "short"
    """Grafana's name of the unit."""
    highest: float | None = None
    """Top of the axis."""
    kind: str = "timeseries"
    """Grafana's name of the panel type."""
    stacked: bool = False
    """Series on top of each other."""


def _run(name: str, labels: str = "") -> str:
    return f'ray_tstar_{name}{{run=~"$run"{labels}}}'


PANELS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel("Rollout accuracy", {"{{run}}": _run("accuracy")}, "percentunit", 1),
        Panel("Tokens per forward", {"{{run}}": _run("tokens_per_forward")}),
        Panel("Mean reward", {"{{run}}": _run("reward")}),
        Panel("KL to the reference policy (nats)", {"{{run}}": _run("kl")}),
    ),
    "Curriculum": (
        Panel(
            "Block size",
            {"{{run}} rollout": _run("rollout_block_size"), "{{run}} train": _run("train_block_size")},
        ),
        Panel("Stage", {"{{run}}": _run("stage")}),
        Panel("Weight version", {"{{run}}": _run("weight_version")}),
    ),
    "What the loop does": (
        Panel("Phase", {"{{phase}}": _run("phase")}, kind="state-timeline"),
        Panel(
            "Idle share of the last update",
            {"{{run}} rollout actors": _run("rollout_idle"), "{{run}} learner": _run("learner_idle")},
            "percentunit",
            1,
        ),
        Panel("Weight publish", {"{{run}}": _run("publish_seconds")}, "s"),
        Panel("Tokens a second by actor", {"{{actor}}": f"deriv({_run('actor_tokens')}[5m])"}, stacked=True),
    ),
    "Groups and verifications": (
        Panel("Groups by how they ended", {"{{outcome}}": f"sum by (outcome) ({_run('groups')})"}, stacked=True),
        Panel("Groups dispatched and not ended", {"{{run}}": _run("buffer_depth")}),
        Panel("Staleness, largest of the last update", {"{{run}}": _run("staleness")}),
        Panel(
            "Verifications a minute",
            {"{{verdict}}": f"60 * sum by (verdict) (deriv({_run('verdicts')}[5m]))"},
            stacked=True,
        ),
    ),
    "Actors": (
        Panel("At work", {"{{run}} rollout": _run("rollout_actors"), "{{run}} reward": _run("reward_actors")}),
        Panel(
            "Starting or restarting",
            {"{{run}} rollout": _run("rollout_actors_starting"), "{{run}} reward": _run("reward_actors_starting")},
        ),
        Panel(
            "Replaced so far", {"{{run}} actors": _run("actor_restarts"), "{{run}} learner": _run("learner_restarts")}
        ),
    ),
}


def make() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, members in PANELS.items():
        panels.append({"type": "row", "title": row, "id": len(panels) + 1, "gridPos": _place(0, top, _WIDTH, 1)})
        top += 1
        width = _WIDTH // len(members)
        for index, panel in enumerate(members):
            panels.append(_panel(panel, len(panels) + 1, _place(index * width, top, width, _HEIGHT)))
        top += _HEIGHT
    return {
        "title": "T* runs",
        "uid": "tstarRuns",
        "tags": ["ray", "tstar_ray"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"fillOpacity": 20 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "id": number,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "max": panel.highest, "custom": custom},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + index), "legendFormat": legend, "expr": query}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    query = "label_values(ray_tstar_stage, run)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
        {
            "name": "run",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": "run"},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n")
