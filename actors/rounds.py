"""Calls of several threads take turns at one engine's rounds.

    generate, stream ─► submit ─► [ turn: what is mine has ended? ─► else one round for everybody ]* ─► trajectories
    paused ─► no further round begins; the present one ends first

Whoever waits drives the engine, for all callers together; there is no thread behind it that could be left over.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from actors.engine import CancelledError
from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Request, Trajectory


class Rounds(ABC):
    """What engines that decode in rounds share of `actors.engine.Engine`."""

    def __init__(self) -> None:
        self._ended: dict[int, Trajectory | RuntimeError] = {}
        """What has ended and was not fetched yet, by ticket."""
        self._tickets = itertools.count()
        self._turn = threading.RLock()
        self._door, self._open, self._pauses = threading.Lock(), threading.Event(), 0
        self._open.set()

    @property
    def broken(self) -> bool:
        """See `actors.engine.Engine.broken`."""
        return False

    @abstractmethod
    def _submit(self, requests: Sequence[Request], decoding: Decoding) -> list[int]:
        """Queue requests, each under a ticket of its own. Raises ValueError for one that can never be served."""

    @abstractmethod
    def _round(self) -> None:
        """One step for all that is under way; what ends goes into ``_ended``."""

    @abstractmethod
    def _under_way(self) -> dict[int, Request]:
        """What has not ended, by ticket."""

    @abstractmethod
    def _drop(self, tickets: set[int]) -> None:
        """Forget what is under way for these."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """See `actors.engine.Engine.generate`. Raises ValueError for a request that can never be served."""
        tickets = self._submit(requests, decoding)
        found = dict(self._collect(tickets))
        return [found[ticket] for ticket in tickets]

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Trajectory]:
        """See `actors.engine.Engine.stream`."""
        return (trajectory for _, trajectory in self._collect(self._submit(requests, decoding)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See `actors.engine.Engine.paused`."""
        with self._door:
            self._pauses += 1
            self._open.clear()  # rounds that have not begun wait for it, so that the present one is the last
        try:
            with self._turn:
                yield
        finally:
            with self._door:
                self._pauses -= 1
                if not self._pauses:
                    self._open.set()

    def cancel(self, group_ids: Collection[int]) -> None:
        """See `actors.engine.Engine.cancel`."""
        with self.paused():
            tickets = {ticket for ticket, request in self._under_way().items() if request.group_id in group_ids}
            self._give_up(tickets)
            self._ended.update({ticket: CancelledError("its group was cancelled") for ticket in tickets})

    def _collect(self, tickets: Sequence[int]) -> Iterator[tuple[int, Trajectory]]:
        """Take rounds until all of ``tickets`` have ended; other callers' work is decoded on the way."""
        left = set(tickets)
        try:
            while left:
                self._open.wait()
                with self._turn:
                    ended = [(ticket, self._ended.pop(ticket)) for ticket in left & self._ended.keys()]
                    if not ended:
                        self._guarded_round()
                for ticket, outcome in ended:
                    left.discard(ticket)
                    if isinstance(outcome, RuntimeError):
                        raise outcome
                    yield ticket, outcome
        finally:
            if left:
                self._give_up(left)

    def _guarded_round(self) -> None:
        try:
            self._round()
        except BaseException:
            # Memory ran out, or the device failed: what was under way is lost, for every caller.
            lost = set(self._under_way())
            told = "decoding failed in another call, which took this call's sequences with it"
            self._ended.update({ticket: RuntimeError(told) for ticket in lost})
            self._drop(lost)
            raise

    def _give_up(self, tickets: set[int]) -> None:
        with self.paused():
            self._drop(tickets)
            for ticket in tickets & self._ended.keys():
                del self._ended[ticket]
