"""The numbers of one update, for the console, TensorBoard, metrics.jsonl and the Ray dashboard; and how a run ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.report import UpdateReport, report_dict
from tstar_ray.collection import Collection
from tstar_ray.evaluate import Evaluation
from tstar_ray.trajectory import Group, tokens_per_forward

DASHBOARD = {
    "accuracy": "rollout/accuracy",
    "tokens_per_forward": "rollout/tpf",
    "reward": "rollout/reward",
    "kl": "learner/kl",
    "staleness": "rollout/staleness_max",
    "rollout_idle": "idle/rollout",
    "learner_idle": "idle/learner",
    "publish_seconds": "seconds/publish",
}
"""Gauge of `cluster.metrics` -> number of an update's record."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    before: list[Evaluation]
    """Start model at each block size."""
    after: list[Evaluation]
    """Trained model at each block size."""
    updates: int
    """Updates made."""
    stopped: bool
    """Ended early by a signal, at an update boundary, with a checkpoint."""
    groups: dict[str, int]
    """Groups that were dispatched, and how they ended; these add up."""


def accuracy(groups: Sequence[Group]) -> float:
    """Share of correct samples."""
    verdicts = [s.verdict == "correct" for g in groups for s in g.samples]
    return float(np.mean(verdicts)) if verdicts else 0.0


def staleness(groups: Sequence[Group], version: int) -> list[int]:
    """Of each sample: learner version minus the oldest weights that revealed any of its tokens."""
    return [version - s.trajectory.oldest_version for g in groups for s in g.samples]


def update_record(
    collection: Collection,
    trainable: Sequence[Group],
    report: UpdateReport | None,
    *,
    asked: int,
    variants: int = 0,
    version: int,
    wall_s: float,
    busy_s: float,
    actors: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One update. ``asked``: groups before any refill; ``variants``: ways to decode within a group; ``version``: of the
    weights that were trained; ``busy_s``: seconds of rollout actors at work, summed; ``seconds``: of the controller by
    phase, and of its process on a core (``driver_cpu``)."""
    samples = [s for g in collection.groups for s in g.samples]
    trajectories = [s.trajectory for s in samples]
    age = staleness(collection.groups, version)
    record: dict[str, Any] = {
        "rollout/accuracy": accuracy(collection.groups),
        "rollout/reward": float(np.mean([s.reward for s in samples])),
        "rollout/tpf": tokens_per_forward(trajectories, commits=False),
        "rollout/tpf_with_commits": tokens_per_forward(trajectories, commits=True),
        "rollout/truncated": float(np.mean([t.stop_reason == "length" for t in trajectories])),
        "rollout/mean_tokens": float(np.mean([t.completion_len for t in trajectories])),
        "rollout/tokens_per_s": sum(t.completion_len for t in trajectories) / max(collection.rollout_s, 1e-9),
        "weights/version": version,
        "rollout/staleness_max": max(age),
        "rollout/staleness_mean": float(np.mean(age)),
        "rollout/stale_cache": float(np.mean([t.stale_cache for t in trajectories])),
        "groups/trained": len(trainable),
        "groups/filtered": len(collection.groups) - len(trainable),
        "groups/failed": len(collection.failed),
        "groups/refilled": len(collection.groups) + len(collection.failed) - asked,
        "groups/retried_samples": collection.retries,
        "idle/rollout": max(0.0, 1 - busy_s / (wall_s * max(1, actors))),
        "idle/learner": 1 - seconds.get("train", 0.0) / wall_s,
        "seconds/update": wall_s,
        **{f"verdict/{verdict}": count for verdict, count in collection.verdicts.items()},
        "seconds/train": 0.0,
        "seconds/publish": 0.0,
        **{f"seconds/{phase}": s for phase, s in seconds.items()},
        "seconds/wait": seconds.get("rollout", 0.0),
        "seconds/rollout": collection.rollout_s,
        "seconds/reward": collection.reward_s,
    }
    for index in range(variants):
        own = [s for s in samples if s.trajectory.sample % variants == index]
        record |= {
            f"variant/{index}/accuracy": float(np.mean([s.verdict == "correct" for s in own])),
            f"variant/{index}/tpf": tokens_per_forward([s.trajectory for s in own], commits=False),
        }
    if report:
        record |= {f"learner/{k}": v for k, v in report_dict(report).items() if not math.isnan(v)}
    return record
