"""Groups on disk: one Parquet row a sample, with its trajectory, its text and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tstar_ray.problems import Problem
from tstar_ray.trajectory import Group, Sample, Trajectory

SCHEMA_VERSION = 2

_TRAJECTORY_TYPES: dict[str, pa.DataType] = {
    "group_id": pa.int64(),
    "sample": pa.int32(),
    "token_ids": pa.list_(pa.int32()),
    "prompt_len": pa.int32(),
    "completion_len": pa.int32(),
    "step_map": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "block_size": pa.int32(),
    "temperature": pa.float32(),
    "weight_versions": pa.list_(pa.int64()),
    "stop_reason": pa.string(),
    "stale_cache": pa.bool_(),
}
_SAMPLE_TYPES: dict[str, pa.DataType] = {"text": pa.string(), "verdict": pa.string(), "reward": pa.float32()}
_PROBLEM_TYPES: dict[str, pa.DataType] = {
    "problem_id": pa.string(),
    "question": pa.string(),
    "answer": pa.string(),
}
SCHEMA = pa.schema(
    [*(_TRAJECTORY_TYPES | _SAMPLE_TYPES | _PROBLEM_TYPES).items()],
    metadata={"tstar_ray.schema": str(SCHEMA_VERSION)},
)
"""One row a sample."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in a run groups were trained."""

    stage: str
    """Name of the stage."""
    update: int
    """Updates made before theirs."""


def groups_to_table(groups: Sequence[Group]) -> pa.Table:
    """One row a sample, in order."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for group in groups:
        for sample in group.samples:
            for name in _TRAJECTORY_TYPES:
                columns[name].append(getattr(sample.trajectory, name))
            for name in _SAMPLE_TYPES:
                columns[name].append(getattr(sample, name))
            columns["problem_id"].append(group.problem.id)
            columns["question"].append(group.problem.question)
            columns["answer"].append(group.problem.answer)
    return pa.table(columns, schema=SCHEMA)


def table_to_groups(table: pa.Table) -> list[Group]:
    """The inverse of `groups_to_table`; rows of one group stand together."""
    version = (table.schema.metadata or {}).get(b"tstar_ray.schema", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise ValueError(f"trajectories of schema {version}; this version reads schema {SCHEMA_VERSION}")
    dtypes = {"token_ids": np.int32, "step_map": np.int32, "logprobs": np.float32, "weight_versions": np.int64}
    groups: dict[int, Group] = {}
    for row in table.to_pylist():
        values = {f.name: row[f.name] for f in fields(Trajectory)}
        values |= {name: np.asarray(values[name], dtype=dtype) for name, dtype in dtypes.items()}
        sample = Sample(Trajectory(**values).validate(), row["text"], row["verdict"], row["reward"])
        problem = Problem(row["problem_id"], row["question"], row["answer"])
        group = groups.get(row["group_id"], Group(row["group_id"], problem, ()))
        groups[row["group_id"]] = replace(group, samples=(*group.samples, sample))
    return list(groups.values())


def write_traces(path: Path, groups: Sequence[Group], origin: Origin | None = None) -> None:
    """Write groups as Parquet (zstd), readable by any Parquet tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = groups_to_table(groups)
    if origin:
        added = {"tstar_ray.stage": origin.stage, "tstar_ray.update": str(origin.update)}
        table = table.replace_schema_metadata((table.schema.metadata or {}) | added)
    pq.write_table(table, path, compression="zstd")


def read_traces(path: Path) -> list[Group]:
    """Groups of one Parquet file written by `write_traces`."""
    return table_to_groups(pq.read_table(path))


def read_origin(path: Path) -> Origin | None:
    """What `write_traces` was told of where they come from."""
    metadata = pq.read_schema(path).metadata or {}
    stage = metadata.get(b"tstar_ray.stage")
    return Origin(stage.decode(), int(metadata[b"tstar_ray.update"])) if stage else None
