"""What a run has spent, and what it had reached by then, read back from its metrics.jsonl.

Samples are what rollouts cost, learner tokens what training costs: packed slices grow with the block size, so equal
samples are not equal learner tokens. A comparison needs both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KEYS = ("samples", "trained_samples", "completion_tokens", "learner_tokens", "train_seconds", "rollout_seconds")
"""Completions with a verdict, those trained on, their tokens, tokens of the learner's rows, and seconds."""
_SPENT = ("update", "collapsed")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records in order; a kill may have cut the last line short. An evaluation says whether it was made ``during``
    training, on `eval.problems_during` problems, or belongs to a table at the ends."""
    recorded = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.endswith("}"):
            continue
        record = json.loads(line)
        if record["kind"] == "update":
            recorded = record["update"]
        elif record["kind"] == "evaluation":
            # One during training stands before the record of its update, one of a table behind it.
            record["during"] = record["update"] > recorded
        yield record


def spent(update: Mapping[str, Any]) -> dict[str, float]:
    """Of one update's record."""
    samples = sum(count for name, count in update.items() if name.startswith("verdict/"))
    return {
        "samples": samples,
        "trained_samples": update.get("learner/samples", 0),
        "completion_tokens": samples * update["rollout/mean_tokens"],
        "learner_tokens": update.get("learner/forwarded_tokens", 0),
        "train_seconds": update["seconds/train"],
        "rollout_seconds": update["seconds/rollout"],
    }


def read_budget(path: Path) -> dict[str, float]:
    """Sums over all updates of a run, and the batches that it decoded and did not train on, as they had collapsed."""
    total = dict.fromkeys(KEYS, 0.0)
    for record in read_metrics(path):
        if record["kind"] in _SPENT:
            for name, value in spent(record).items():
                total[name] += value
    return total


def read_curve(path: Path) -> list[dict[str, float]]:
    """Every held-out evaluation of a run: block size, accuracy, TPF, ``during``, and what had been spent before it."""
    total, points = dict.fromkeys(KEYS, 0.0), []
    # Evaluations after an update stand before its own record.
    records = sorted(read_metrics(path), key=lambda r: (r["update"], r["kind"] == "evaluation"))
    for record in records:
        if record["kind"] in _SPENT:
            for name, value in spent(record).items():
                total[name] += value
        elif record["kind"] == "evaluation":
            for name, accuracy in record.items():
                block = name.removeprefix("eval_b").removesuffix("/accuracy")
                if block.isdigit():
                    tpf = record[f"eval_b{block}/tpf"]
                    point = {"update": record["update"], "block": int(block), "accuracy": accuracy, "tpf": tpf}
                    point |= {"during": record["during"]}
                    points.append(point | {name: total[name] for name in ("samples", "learner_tokens")})
    return points
