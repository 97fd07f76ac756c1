"""The reward actor: a verifier pool behind Ray."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from reward.verifier import Result, VerifierPool, summarise


class RewardWorker:
    """Scores completions; its verifier processes end with it."""

    def __init__(self, index: int, *, workers: int, deadline_s: float, grader: str) -> None:
        self._index = index
        self._pool = VerifierPool(workers=workers, deadline_s=deadline_s, grader=grader)

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def ready(self) -> str:
        """Answer once the verifier processes run."""
        return f"{self!r} on {platform.node()} pid {os.getpid()}"

    def score(self, items: Sequence[tuple[str, str]]) -> list[Result]:
        """One result for each (completion text, gold answer)."""
        return self._pool.verify(items)

    def stats(self) -> dict[str, int]:
        """Verdicts so far, and workers replaced."""
        return summarise(self._pool.counts) | {"replaced": self._pool.replaced}


def remote_class() -> Any:
    """`RewardWorker` as a Ray actor class; Ray is imported here and nowhere else in this package."""
    import ray

    return ray.remote(RewardWorker)
