"""The reward actor: a verifier pool behind Ray."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Any

from reward.verifier import Limits, Result, VerifierPool
from tstar_ray.place import Place, here

CALLS = 8
"""Calls of `score` that an actor takes at a time; their samples share its verifier processes."""


class RewardWorker:
    """Scores completions; its verifier processes end with it."""

    def __init__(self, index: int, *, workers: int, deadline_s: float, grader: str) -> None:
        self._index, self._workers, self._deadline_s, self._grader = index, workers, deadline_s, grader

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def ready(self) -> Place:
        """Start the verifier processes, and answer once one graded something; see `actors.rollout` for why here."""
        try:
            pkgutil.resolve_name(self._grader)
        except (ImportError, AttributeError, ValueError) as error:
            told = f"reward.grader={self._grader!r} cannot be imported ({error}); write module:function"
            raise ValueError(told) from error
        self._pool = VerifierPool(self._workers, grader=self._grader, limits=Limits(deadline_s=self._deadline_s))
        self._pool.verify([("\\boxed{1}", "1")])
        return here(repr(self))

    def progress(self) -> int:
        """Verifications so far, of whatever outcome."""
        return sum(self._pool.counts.values())

    def pids(self) -> list[int]:
        """Verifier processes."""
        return self._pool.pids

    def score(self, items: Sequence[tuple[str, str]]) -> list[Result]:
        """One result for each (completion text, gold answer)."""
        return self._pool.verify(items)

    def stats(self) -> dict[str, int]:
        """Verdicts so far, and verifier processes replaced by reason."""
        return {verdict.value: count for verdict, count in self._pool.counts.items()} | self._pool.respawns


def remote_class() -> Any:
    """`RewardWorker` as a Ray actor class; Ray is imported here and nowhere else in this package."""
    import ray

    for method in (RewardWorker.ready, RewardWorker.progress, RewardWorker.pids):
        ray.method(concurrency_group="health")(method)
    options: Any = {"max_concurrency": CALLS, "concurrency_groups": {"health": 1}}
    return ray.remote(**options)(RewardWorker)
