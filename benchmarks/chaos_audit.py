"""The books of a run, checked from what it left on disk alone: nothing lost, nothing twice, nothing too old.

metrics.jsonl, result.json, traces/*.parquet, the last checkpoint ──► Audit    (AssertionError where they do not add up)
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tstar_ray.checkpoint import newest_checkpoint
from tstar_ray.config import Config
from tstar_ray.data import ProblemStream, load_problem_sets
from tstar_ray.model_files import inspect_checkpoint
from tstar_ray.traces import read_traces


@dataclass(frozen=True, slots=True)
class Audit:
    """What the books say."""

    updates: int
    """Made, each recorded exactly once."""
    groups: dict[str, int]
    """Dispatched, and how they ended."""
    problems: int
    """Of the stream, each used exactly once."""
    staleness: dict[int, int]
    """Distance in weight versions -> denoised blocks that were trained at it."""
    bound: int
    """Largest distance allowed."""
    verdicts: dict[str, int]
    """Verifications by outcome."""


def audit(folder: Path) -> Audit:
    """Check a run that has ended."""
    config = Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    records = _records(folder, "update")
    total = len(records)
    assert [r["update"] for r in records] == list(range(1, total + 1)), "an update is missing or recorded twice"
    traces = {int(p.stem.removeprefix("update-")): p for p in (folder / "traces").glob("update-*.parquet")}
    assert sorted(traces) == list(range(1, total + 1)), "traces of an update are missing or left over"
    ids: Counter[int] = Counter()
    problems: Counter[str] = Counter()
    ages: Counter[int] = Counter()
    for record in records:
        for group in read_traces(traces[record["update"]]):
            ids[group.group_id] += 1
            problems[group.problem.id] += 1
            assert len(group.samples) == config.rollout.group_size, f"group {group.group_id} is not complete"
            blocks = {s.trajectory.block_size for s in group.samples}
            assert blocks == {record["stage/rollout_block"]}, f"group {group.group_id}: blocks {blocks}"
            for sample in group.samples:
                ages.update(record["weights/version"] - int(v) for v in sample.trajectory.weight_versions)
    assert max(ids.values()) == 1, "a group was trained twice"
    bound = config.rollout.max_staleness
    assert set(ages) <= set(range(bound + 1)), f"staleness {min(ages)} to {max(ages)}, the bound is {bound}"
    state = newest_checkpoint(folder / "checkpoints", refused=_refuse).state
    ended, dispatched = state["ledger"]["ended"], state["ledger"]["dispatched"]
    assert dispatched == sum(ended.values()), f"{dispatched} groups dispatched, ended {ended}"
    for outcome in ("trained", "filtered", "failed"):
        recorded = sum(r[f"groups/{outcome}"] for r in records)
        assert ended[outcome] == recorded, f"{recorded} groups recorded as {outcome}, the books say {ended[outcome]}"
    assert ended["trained"] + ended["filtered"] == len(ids), f"{len(ids)} groups in the traces, ended {ended}"
    told = json.loads((folder / "result.json").read_text())["groups"]
    exported = {k.removeprefix("groups_total/"): v for k, v in _records(folder, "groups")[-1].items() if "/" in k}
    assert told == exported == {"dispatched": dispatched, **ended}, f"result {told}, metrics {exported}, books {ended}"
    _check_problems(config, state, problems, failed=ended["failed"])
    verdicts: Counter[str] = Counter()
    for record in records:
        verdicts.update({k.removeprefix("verdict/"): v for k, v in record.items() if k.startswith("verdict/")})
    return Audit(
        updates=total,
        groups={"dispatched": dispatched, **ended},
        problems=len(problems),
        staleness=dict(sorted(ages.items())),
        bound=bound,
        verdicts=dict(verdicts),
    )


def _check_problems(config: Config, state: dict[str, Any], used: Counter[str], *, failed: int) -> None:
    """Every problem of the stream up to the cursor was used once, failed, or is still to come (invariant 10)."""
    tokenizer, _ = inspect_checkpoint(config.model.path, mask_token_id=config.model.mask_token_id)
    sets = load_problem_sets(config.data, tokenizer, held_out=config.eval.problems)
    stream = ProblemStream(sets.train, seed=config.run.seed)
    positions = set(range(state["cursor"])) - set(state["returned"])
    expected = Counter(stream.problem(position).problem.id for position in positions)
    assert not used - expected, f"problems used more often than dispatched: {used - expected}"
    lost = expected - used
    assert lost.total() == failed, f"{lost.total()} problems are in no group, {failed} groups failed"


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def _refuse(reason: str) -> None:
    raise AssertionError(reason)
