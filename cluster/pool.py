"""A fixed number of named actors, replaced when they are lost.

A lost actor is killed for good and a new one is made under the next name, so that a late answer of the old one
can never be taken for the new one's. Replacements are counted against one budget for the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from cluster.session import ClusterError


class ActorPool:
    """Actors of one role."""

    def __init__(self, role: str, create: Callable[[int, str], Any], *, count: int, max_restarts: int) -> None:
        """``create(index, name)`` makes actor number ``index``; ``max_restarts`` is per actor, pooled."""
        self._role, self._create = role, create
        self._budget = count * max_restarts
        self._index: dict[str, int] = {}
        self.handles: dict[str, Any] = {}
        """Live actors by name."""
        self.restarts = 0
        """Replacements so far."""
        for index in range(count):
            self._add(index, f"{role}-{index}")

    def _add(self, index: int, name: str) -> str:
        self.handles[name] = self._create(index, name)
        self._index[name] = index
        return name

    def replace(self, name: str, reason: str) -> str:
        """Put a new actor in the place of a lost one; returns its name. Raises ClusterError past the budget."""
        self.restarts += 1
        index = self._index.pop(name)
        ray.kill(self.handles.pop(name))
        if self.restarts > self._budget:
            raise ClusterError(
                f"{name} was lost ({reason}), and the {self._role} actors' {self._budget} restarts are used up "
                "(actors.max_restarts per actor)"
            )
        return self._add(index, f"{self._role}-{index}-r{self.restarts}")

    def stop(self) -> None:
        """Kill all."""
        for handle in self.handles.values():
            ray.kill(handle)
        self.handles.clear()
