"""How the system around the model scales: the real controller over simulated engines and learner; prints JSON.

    python -m benchmarks.scaling [--actors 1 2 4 8 16 32 64] [--staleness 0 1 2 4] [--updates 4] [--out FILE]

``actors``: tokens a second of N rollout actors, asynchronous, with an update that takes no time, and work that grows
with N: ``of_ideal`` against all slots always decoding, ``efficiency`` against N times those of the first row. Rows of
few actors have few samples an update, and are measured over more updates. ``staleness``: four actors and a learner
whose update takes as long as synchronous rollouts of a batch: idle shares of both, and tokens a second against
staleness 0.

Every simulated actor is a process that imports torch, about 200 MB of its own: 64 of them need 13 GB. All of them share
the machine with the driver: what they cost themselves counts against the efficiency.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulated import simulate
from benchmarks.simulated_actors import Times
from tstar_ray.config import Config, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--updates", type=int, default=4, help="updates measured; those that fill the window are not")
    parser.add_argument("--least", type=int, default=16, help="updates times actors measured at least")
    parser.add_argument("--groups", type=int, default=12, help="groups an update takes for each actor")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times = Times()
    found: dict[str, Any] = {"machine": platform.node(), "times": asdict(times)}
    found["actors"] = _scaling(arguments.actors, times, arguments)
    found["staleness"] = _idle(arguments.staleness, times, arguments)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def _scaling(actors: Sequence[int], times: Times, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for count in actors:
        row = _run(count, 2, replace(times, update_s=0.0), arguments)
        row["efficiency"] = row["tokens_per_s"] / (rows[0]["tokens_per_s"] / rows[0]["actors"] * count) if rows else 1.0
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def _idle(bounds: Sequence[int], times: Times, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if not bounds:
        return []
    balanced = _run(4, 0, replace(times, update_s=0.0), arguments)["rollout_s"]
    rows: list[dict[str, Any]] = []
    for bound in bounds:
        row = _run(4, bound, replace(times, update_s=balanced), arguments) | {"update_s": balanced}
        row["speed"] = row["tokens_per_s"] / rows[0]["tokens_per_s"] if rows else 1.0
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def _run(actors: int, staleness: int, times: Times, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; means over its updates but the first, which fill the window, and the last, which empty it."""
    updates = max(arguments.updates, ceil(arguments.least / actors))
    config = _config(actors, staleness, updates, times, arguments)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        simulate(config, times, Path(folder) / "run", name=f"scaling-{actors}-{staleness}-{time.monotonic_ns()}")
        wall = time.monotonic() - began
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "update"]
    steady = records[1 + staleness : 1 + staleness + updates]
    seconds = sum(r["seconds/update"] for r in steady)
    groups = actors * arguments.groups
    tokens = sum(r["rollout/mean_tokens"] * groups * config.rollout.group_size for r in steady)
    return {
        "actors": actors,
        "max_staleness": staleness,
        "updates": updates,
        "groups_per_update": groups,
        "tokens_per_s": tokens / seconds,
        "of_ideal": tokens / seconds * times.token_s / (actors * times.slots),
        "rollout_idle": float(np.mean([r["idle/rollout"] for r in steady])),
        "learner_idle": float(np.mean([r["idle/learner"] for r in steady])),
        "staleness_max": max(r["rollout/staleness_max"] for r in records),
        "rollout_s": float(np.mean([r["seconds/rollout"] for r in steady])),
        "update_and_publish_s": float(np.mean([r["seconds/train"] + r["seconds/publish"] for r in steady])),
        "publish_s": float(np.mean([r["seconds/publish"] for r in steady])),
        "driver_cpu_ms_per_group": float(np.mean([1e3 * r["seconds/driver_cpu"] / groups for r in steady])),
        "wall_s": wall,
    }


def _config(actors: int, staleness: int, updates: int, times: Times, arguments: argparse.Namespace) -> Config:
    return load_config(
        None,
        [
            "curriculum.blocks=[4]",
            # Nothing is dispatched beyond the end of a stage: a run is longer by the window, at both ends.
            f"curriculum.updates=[{1 + staleness + updates + staleness}]",
            "curriculum.rollback.limit=0",
            f"actors.count={actors}",
            f"reward.count={1 + actors // 32}",
            f"actors.max_batch={times.slots}",
            f"rollout.problems={actors * arguments.groups}",
            "rollout.group_size=8",
            f"rollout.max_staleness={staleness}",
            "rollout.max_new_tokens=1024",
            "eval.problems=1",
            "eval.every=0",
            "run.save_traces=false",
            "run.checkpoint_every=100000",
            "cluster.start_timeout_s=600",
        ],
    )


if __name__ == "__main__":
    main()
