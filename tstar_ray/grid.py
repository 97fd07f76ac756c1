"""The cells of an evaluation: what each is, how it is scored, and where it is kept.

    settings ──► cells ──► not kept yet? ──► collect (rollout and reward actors) ──► CellResult ──► cells/KEY.json
                               │                                                                        │
                               └───────────────────────── kept ─────────────────────────────────────────┴──► table

A cell's key is a hash of all that its score depends on: the weights' checksum, the prompts and answers, the decoding
settings, samples, seed and grader. So an evaluation that was stopped goes on, a wider grid keeps what there is, and
another checkpoint in the same folder never mixes in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tstar_ray import arithmetic
from tstar_ray.collection import Collection
from tstar_ray.config import ARITHMETIC, ConfigError
from tstar_ray.config_base import WorkError
from tstar_ray.config_evaluate import DataSet, EvaluateConfig, GridConfig
from tstar_ray.data import PromptedProblem, encode_prompt, load_problems
from tstar_ray.decoding import Decoding
from tstar_ray.scores import aup, clustered_interval, pass_at_k
from tstar_ray.traces import write_traces
from tstar_ray.trajectory import tokens_per_forward

Collect = Callable[[Mapping[int, PromptedProblem], Decoding, int], Collection]
"""Problems by id, decoding settings, samples a problem -> complete, scored groups."""
_ARITHMETIC_HELD_OUT = 512


@dataclass(frozen=True, slots=True)
class Cell:
    """One data set decoded one way."""

    data: str
    """Its name."""
    decoding: Decoding
    """How."""
    samples: int
    """Samples a problem."""

    @property
    def curve(self) -> tuple[str, int, str, str]:
        """Cells that differ in nothing but the speed setting share a curve."""
        d = self.decoding
        return self.data, d.block_size, d.strategy, d.order

    @property
    def label(self) -> str:
        """One line."""
        return f"{self.data}, {self.decoding.describe()}" + (f", {self.samples} samples" if self.samples > 1 else "")


@dataclass(frozen=True, slots=True)
class CellResult:
    """The score of one cell with everything it was measured with."""

    key: str
    """Hash of what the score depends on."""
    cell: Cell
    """What was measured."""
    model: str
    """Checkpoint as given."""
    checksum: str
    """Of its weights."""
    problems: int
    """Problems with all their verdicts."""
    unscored: int
    """Problems without (engine or verifier failed on every attempt); in no average."""
    accuracy: float
    """Mean over problems of the share of correct samples (mean@samples)."""
    low: float
    """Lower end of its 95 % interval; problems are clusters, see `scores.clustered_interval`."""
    high: float
    """Upper end."""
    pass_at: dict[int, float]
    """k -> pass@k, for 1, 2, 4 … samples."""
    tpf: float
    """Completion tokens a denoising forward."""
    tpf_with_commits: float
    """The same for a decoder that commits each block in a pass of its own."""
    tokens_per_s: float
    """Completion tokens a second of all rollout actors together, from dispatch to the last trajectory."""
    truncated: float
    """Share of completions cut at the length cap."""
    mean_tokens: float
    """Mean completion length."""
    seconds: float
    """From dispatch to the last verdict."""
    correct: tuple[int, ...]
    """Correct samples of each problem, in order."""
    scored: tuple[int, ...]
    """[problems] which of those asked each of them is, from 0."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> CellResult:
        """The inverse of `to_dict`, also after JSON."""
        values = dict(saved)
        cell = dict(values["cell"])
        decoding = Decoding.from_dict(cell["decoding"])
        values |= {
            "cell": Cell(cell["data"], decoding, cell["samples"]),
            "pass_at": {int(k): v for k, v in values["pass_at"].items()},
            "correct": tuple(values["correct"]),
            # A file without them tells only where none is missing.
            "scored": tuple(values.get("scored", range(0 if values["unscored"] else values["problems"]))),
        }
        return cls(**values)


def grid_cells(grid: GridConfig, data: Sequence[str], stop_ids: tuple[int, ...]) -> list[Cell]:
    """Every combination, in reading order: data set, block size, strategy, speed, order."""

    def decodings(block: int, strategy: str) -> list[dict[str, Any]]:
        if strategy == "dynamic":
            return [{"threshold": t} for t in grid.thresholds]
        if strategy == "entropy":
            return [{"entropy_bound": b} for b in grid.entropy_bounds]
        return [{"denoising_steps": -(-block // k)} for k in grid.tokens_per_step if k <= block]

    cells = []
    for name in data:
        for block in grid.blocks:
            for strategy in grid.strategies:
                for speed in decodings(block, strategy):
                    for order in grid.orders:
                        if order == "sub_blocks" and (block % grid.sub_block or block < 2 * grid.sub_block):
                            continue
                        try:
                            decoding = Decoding(
                                block_size=block,
                                max_new_tokens=grid.max_new_tokens,
                                stop_ids=stop_ids,
                                strategy=strategy,
                                temperature=grid.temperature,
                                top_k=grid.top_k,
                                top_p=grid.top_p,
                                confidence=grid.confidence,
                                order=order,
                                sub_block=grid.sub_block,
                                **speed,
                            )
                        except ValueError as error:
                            raise ConfigError(f"grid: {error}") from error
                        cells.append(Cell(name, decoding, grid.samples))
    if not cells:
        raise ConfigError("the grid is empty: no strategy has a speed setting or an order that fits a block size")
    return cells


def load_data_set(data: DataSet, tokenizer: Any) -> tuple[list[PromptedProblem], int]:
    """Problems with their prompts, and how many were left out as too long."""
    if data.source == ARITHMETIC:
        problems = arithmetic.problems("heldout", data.limit or _ARITHMETIC_HELD_OUT)
    else:
        problems = load_problems(data.columns(), data.source, data.split, "data")
    problems = problems[: data.limit] if data.limit else problems
    prompted = [PromptedProblem(p, encode_prompt(tokenizer, data.template, p.question)) for p in problems]
    kept = [p for p in prompted if len(p.prompt_ids) <= data.max_prompt_tokens]
    if not kept:
        raise ConfigError(f"data {data.label}: every prompt exceeds max_prompt_tokens={data.max_prompt_tokens}")
    return kept, len(prompted) - len(kept)


def cell_key(cell: Cell, config: EvaluateConfig, problems: Sequence[PromptedProblem], checksum: str) -> str:
    """Hash of all that the score depends on."""
    asked = blake2b(repr([(p.prompt_ids, p.problem.answer) for p in problems]).encode(), digest_size=16).hexdigest()
    depends = {
        "cell": asdict(cell),
        "problems": asked,
        "weights": checksum,
        "dtype": config.as_run().model.dtype,
        "seed": config.grid.seed,
        "grader": config.reward.grader,
        "score_truncated": config.reward.score_truncated,
    }
    return blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=8).hexdigest()


class Store:
    """Finished cells on disk; each is written at once, whole or not at all."""

    def __init__(self, folder: Path, *, save_traces: bool) -> None:
        self._cells, self._traces, self._save_traces = folder / "cells", folder / "traces", save_traces
        self._cells.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> CellResult | None:
        """The result kept under a key."""
        try:
            return CellResult.from_dict(json.loads((self._cells / f"{key}.json").read_text()))
        except FileNotFoundError:
            return None

    def put(self, result: CellResult, collection: Collection) -> None:
        """Keep a result; its trajectories first, so that a kept cell has them."""
        if self._save_traces:
            write_traces(self._traces / f"{result.key}.parquet", collection.groups)
        path = self._cells / f"{result.key}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result.to_dict()))
        os.replace(unfinished, path)


def score(key: str, cell: Cell, collection: Collection, *, model: str, checksum: str, problems: int) -> CellResult:
    """Sum up what was collected for one cell. Raises WorkError when no problem has its verdicts."""
    if not collection.groups:
        raise WorkError(f"{cell.label}: no problem could be scored; verdicts {dict(collection.verdicts)}")
    correct = [sum(s.verdict == "correct" for s in group.samples) for group in collection.groups]
    trajectories = [s.trajectory for group in collection.groups for s in group.samples]
    low, high = clustered_interval([c / cell.samples for c in correct], cell.samples)
    ks = [k for k in (2**i for i in range(cell.samples.bit_length())) if k <= cell.samples]
    tokens = sum(t.completion_len for t in trajectories)
    return CellResult(
        key=key,
        cell=cell,
        model=model,
        checksum=checksum,
        problems=len(correct),
        unscored=problems - len(correct),
        accuracy=sum(correct) / (len(correct) * cell.samples),
        low=low,
        high=high,
        pass_at={k: sum(pass_at_k(c, cell.samples, k) for c in correct) / len(correct) for k in ks},
        tpf=tokens_per_forward(trajectories, commits=False),
        tpf_with_commits=tokens_per_forward(trajectories, commits=True),
        tokens_per_s=tokens / max(collection.rollout_s, 1e-9),
        truncated=sum(t.stop_reason == "length" for t in trajectories) / len(trajectories),
        mean_tokens=tokens / len(trajectories),
        seconds=collection.rollout_s + collection.reward_s,
        correct=tuple(correct),
        scored=tuple(group.group_id for group in collection.groups),
    )


def run_cells(
    config: EvaluateConfig,
    cells: Sequence[Cell],
    problems: Mapping[str, Sequence[PromptedProblem]],
    collect: Collect,
    store: Store,
    *,
    checksum: str,
    began: Callable[[Cell], None] = lambda cell: None,
    ended: Callable[[CellResult, bool], None] = lambda result, kept: None,
) -> list[CellResult]:
    """Score every cell that is not kept yet. ``ended`` is told of each result, and whether it was there already."""
    results = []
    for cell in cells:
        asked = problems[cell.data]
        key = cell_key(cell, config, asked, checksum)
        result = store.get(key)
        kept = result is not None
        if result is None:
            began(cell)
            # Ids by position: a sample's seed, and so its tokens, do not depend on what else is evaluated.
            collection = collect(dict(enumerate(asked)), cell.decoding, cell.samples)
            result = score(key, cell, collection, model=config.model_folder, checksum=checksum, problems=len(asked))
            store.put(result, collection)
        ended(result, kept)
        results.append(result)
    return results


@dataclass(frozen=True, slots=True)
class Curve:
    """Cells of one data set, block size, strategy and order over their speed settings."""

    data: str
    """Data set."""
    block_size: int
    """B."""
    strategy: str
    """Unmasking strategy."""
    order: str
    """Reveal order."""
    aup: float
    """Area under accuracy x TPF, see `scores.aup`; the best accuracy is that of all cells of the data set here."""
    points: tuple[tuple[float, float], ...]
    """(TPF, accuracy in percent), by TPF."""


def curves(results: Sequence[CellResult]) -> list[Curve]:
    """AUP of every curve, in the order of the cells."""
    best: dict[str, float] = {}
    found: dict[tuple[str, int, str, str], list[tuple[float, float]]] = {}
    for result in results:
        point = (result.tpf, 100 * result.accuracy)
        best[result.cell.data] = max(best.get(result.cell.data, 0.0), point[1])
        found.setdefault(result.cell.curve, []).append(point)
    return [
        Curve(*curve, aup=aup(points, best=best[curve[0]]), points=tuple(sorted(points)))
        for curve, points in found.items()
    ]


def write_results(folder: Path, config: EvaluateConfig, results: Sequence[CellResult]) -> None:
    """results.json with everything, results.parquet with a row a cell."""
    document = {
        "settings": config.model_dump(mode="json"),
        "cells": [r.to_dict() | {"label": r.cell.label} for r in results],
        "curves": [asdict(curve) for curve in curves(results)],
    }
    unfinished = folder / "results.tmp"
    unfinished.write_text(json.dumps(document, indent=1))
    os.replace(unfinished, folder / "results.json")
    areas = {(c.data, c.block_size, c.strategy, c.order): c.aup for c in curves(results)}
    rows = []
    for result in results:
        row = result.to_dict()
        cell = row.pop("cell")
        row["pass_at"] = [{"k": k, "value": v} for k, v in result.pass_at.items()]
        row |= {"correct": list(result.correct), "scored": list(result.scored)}
        rows.append({"data": cell["data"], "samples": cell["samples"], **cell["decoding"], **row})
        rows[-1] |= {"aup": areas[result.cell.curve], "settings": result.cell.label}
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "results.parquet", compression="zstd")


def read_results(folder: Path) -> list[CellResult]:
    """Cells of results.json. Raises ValueError naming the folder where there are none."""
    try:
        document = json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no results.json; no evaluation was finished there") from None
    return [CellResult.from_dict({k: v for k, v in cell.items() if k != "label"}) for cell in document["cells"]]
