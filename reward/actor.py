"""The reward actor: a verifier pool behind Ray."""

from __future__ import annotations

import os
import pkgutil
import platform
from collections.abc import Sequence
from typing import Any

from reward.verifier import Limits, Result, VerifierPool


class RewardWorker:
    """Scores completions; its verifier processes end with it."""

    def __init__(self, index: int, *, workers: int, deadline_s: float, grader: str) -> None:
        self._index = index
        try:
            pkgutil.resolve_name(grader)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"reward.grader={grader!r} cannot be imported ({error}); write module:function") from error
        self._pool = VerifierPool(workers, grader=grader, limits=Limits(deadline_s=deadline_s))

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def ready(self) -> str:
        """Answer once a verifier process graded something."""
        self._pool.verify([("\\boxed{1}", "1")])
        return f"{self!r} on {platform.node()} pid {os.getpid()}"

    def score(self, items: Sequence[tuple[str, str]]) -> list[Result]:
        """One result for each (completion text, gold answer)."""
        return self._pool.verify(items)

    def stats(self) -> dict[str, int]:
        """Verdicts so far, and verifier processes replaced by reason."""
        return {verdict.value: count for verdict, count in self._pool.counts.items()} | self._pool.respawns


def remote_class() -> Any:
    """`RewardWorker` as a Ray actor class; Ray is imported here and nowhere else in this package."""
    import ray

    return ray.remote(RewardWorker)
