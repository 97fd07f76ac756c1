"""Accounting of groups: every dispatched group ends exactly once (invariant 6)."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, get_args

Outcome = Literal["trained", "filtered", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Ledger:
    """Counts dispatches and ends, and refuses an end without a dispatch or a second one."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self.dispatched = 0
        self.ended: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))

    @property
    def next_id(self) -> int:
        """The id the next group gets; ids count up through a run, also across a resume."""
        return self.dispatched

    @property
    def depth(self) -> int:
        """Groups dispatched and not ended."""
        return len(self._open)

    @property
    def totals(self) -> dict[str, int]:
        """Groups dispatched, and how those that ended did."""
        return {"dispatched": self.dispatched, **self.ended}

    def dispatch(self) -> int:
        """Open a group and return its id."""
        group_id = self.dispatched
        self.dispatched += 1
        self._open.add(group_id)
        return group_id

    def end(self, group_id: int, outcome: Outcome) -> None:
        """Close a group."""
        if group_id not in self._open:
            raise AssertionError(f"group {group_id} ended as {outcome}, but it is not open")
        self._open.remove(group_id)
        self.ended[outcome] += 1

    def check(self) -> None:
        """Assert that the counts add up."""
        assert self.dispatched == sum(self.ended.values()) + len(self._open), self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. Open groups do not outlive the process: they count as cancelled."""
        ended = dict(self.ended) | {"cancelled": self.ended["cancelled"] + self.depth}
        return {"dispatched": self.dispatched, "ended": ended}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.dispatched, self.ended = saved["dispatched"], Counter(saved["ended"])
        self._open.clear()
        self.check()
