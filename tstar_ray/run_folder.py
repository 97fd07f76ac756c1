"""What a run left behind, read for people: settings, numbers of every update, held-out scores, traces.

    runs/NAME/  config.yaml  metrics.jsonl  result.json  traces/update-NNNNN.parquet

Reads a run that still goes on, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tstar_ray.budget import read_metrics
from tstar_ray.config import Config, ConfigError, Stage, load_config
from tstar_ray.decoding import Decoding, Variant
from tstar_ray.schedule import Reveals, view


@dataclass(frozen=True, slots=True)
class StageSpan:
    """The updates of one stage."""

    stage: Stage
    """Its settings."""
    updates: tuple[int, ...]
    """Their numbers, ascending."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Samples of every group that were decoded in one way, where `rollout.variants` has several."""

    variants: tuple[int, ...]
    """Sample i is one of them where i modulo ``of`` is one of these."""
    of: int
    """Number of variants."""
    how: str
    """Which way, to read."""

    def __str__(self) -> str:
        return f"variant {', '.join(map(str, self.variants))} of {self.of}, {self.how}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run."""

    folder: Path
    """Where it is."""
    config: Config
    """Its settings."""
    updates: tuple[dict[str, Any], ...]
    """Records of its updates, in order; see `tstar_ray.record`."""
    evaluations: tuple[dict[str, Any], ...]
    """Held-out scores: update, during (`tstar_ray.budget.read_metrics`), block_size, accuracy,
    low, high, tpf, tpf_with_commits, truncated, mean_tokens."""
    result: dict[str, Any] | None
    """`result.json`; None while the run has not ended."""

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @property
    def samples(self) -> int:
        """Verifications of all updates, replaced samples included."""
        return sum(int(v) for r in self.updates for k, v in r.items() if k.startswith("verdict/"))

    @property
    def stages(self) -> tuple[StageSpan, ...]:
        """Stages with at least one update, in order."""
        spans = []
        for stage in self.config.curriculum.resolve():
            own = tuple(r["update"] for r in self.updates if r["stage"] == stage.name)
            if own:
                spans.append(StageSpan(stage, own))
        return tuple(spans)

    def series(self, name: str, span: StageSpan | None = None) -> tuple[list[int], list[float]]:
        """Updates and values of one number, where it was recorded."""
        kept = [r for r in self.updates if name in r and (span is None or r["update"] in span.updates)]
        return [r["update"] for r in kept], [float(r[name]) for r in kept]

    def traces(self, update: int) -> Path | None:
        """Trajectories of an update, if they were kept."""
        path = self.folder / "traces" / f"update-{update:05d}.parquet"
        return path if path.is_file() else None

    def reveals(self, updates: Sequence[int], block_size: int, alike: Alike | None = None) -> Reveals | None:
        """Blocks of the trajectories of some updates; None where no traces were kept."""
        paths = [path for path in map(self.traces, updates) if path]
        return read_reveals(paths, block_size, alike) if paths else None


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; raises ConfigError naming what is missing."""
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: no run folder (it has no config.yaml and metrics.jsonl)")
    records = list(read_metrics(folder / "metrics.jsonl"))
    evaluations = []
    for record in (r for r in records if r["kind"] == "evaluation"):
        values = {k.partition("/")[2]: v for k, v in record.items() if k.startswith("eval_b")}
        block = next(int(k.partition("/")[0].removeprefix("eval_b")) for k in record if k.startswith("eval_b"))
        told = {name: record[name] for name in ("update", "during")}
        evaluations.append({**told, "block_size": block, **values})
    result = folder / "result.json"
    return RunFolder(
        folder=folder.resolve(),
        config=load_config(folder / "config.yaml"),
        updates=tuple(r for r in records if r["kind"] == "update"),
        evaluations=tuple(evaluations),
        result=json.loads(result.read_text()) if result.is_file() else None,
    )


def decoded_alike(config: Config, stage: Stage) -> Alike | None:
    """The samples of a stage whose schedules can be measured together; None: all of them.

    Of `rollout.variants`: those that decode as the stage says. Where none does, the first whose order is its own choice
    and those like it; where each forces an order, the first.
    """
    variants = config.rollout.variants
    block, limit = stage.rollout_block, config.rollout.max_new_tokens
    as_stage = Decoding(block, limit, (), stage.strategy, threshold=stage.threshold)
    ways = [as_stage.varied(Variant(v.threshold, v.sub_block)) for v in variants]
    if set(ways) <= {as_stage}:
        return None
    way = min(ways, key=lambda w: (w != as_stage, w.order != "learned"))
    how = f"in sub-blocks of {way.sub_block}" if way.order == "sub_blocks" else f"at threshold {way.threshold:g}"
    return Alike(
        tuple(i for i, other in enumerate(ways) if other == way),
        len(ways),
        "decoded as the stage says" if way == as_stage else f"decoded {how}: none is as the stage says",
    )


def read_reveals(paths: Sequence[Path], block_size: int, alike: Alike | None = None) -> Reveals:
    """Blocks of all trajectories in Parquet files of `tstar_ray.traces`, or of those decoded alike; only the columns
    needed are read."""
    parts = []
    for path in paths:
        table = pq.read_table(path, columns=["sample", "step_map", "prompt_len", "completion_len"])
        if alike:
            table = table.filter(np.isin(table["sample"].to_numpy() % alike.of, alike.variants))
        column = table["step_map"].combine_chunks()
        flat, ends = column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())
        maps = np.split(flat, ends[:-1])
        parts.append(view(maps, table["prompt_len"].to_pylist(), table["completion_len"].to_pylist(), block_size))
    return Reveals(np.concatenate([p.step_KB for p in parts]), np.concatenate([p.steps_K for p in parts]))
