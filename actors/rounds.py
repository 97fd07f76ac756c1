"""Calls of several threads are decoded together, in rounds that one of them drives at a time.

    generate, stream ─► submit ─► [ has mine ended? ─► else drive a round, or wait for who does ]* ─► trajectories
    paused ─► no further round begins; the present one ends first

Whoever waits drives the engine, for all callers together; there is no thread behind it that could be left over.

**Nobody starves.** No round begins while somebody waits for what has ended already, so that a call returns right after
its own last sequence ended, whoever drives and however long the others take.

**Giving up never waits.** What a closed stream or a failed call leaves behind is noted, and dropped before the next
round or in the next pause. An iterator may be closed by the garbage collector, in the middle of any thread's round.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from actors.engine import CancelledError
from tstar_ray.decoding import Decoding
from tstar_ray.trajectory import Request, Trajectory


class Rounds(ABC):
    """What engines that decode in rounds share of `actors.engine.Engine`."""

    def __init__(self) -> None:
        self._ended: dict[int, Trajectory | RuntimeError] = {}
        """What has ended and was not fetched yet, by ticket."""
        self._tickets = itertools.count()
        self._changed = threading.Condition()
        """Guards the three below; notified when one who waits may go on."""
        self._driving = False
        """A round is under way; what it ends is in ``_ended`` for good once it is over."""
        self._pauses = 0
        """Pauses that are open or wait for the present round to end."""
        self._holder: int | None = None
        """Thread that holds the engine in a pause."""
        self._waiting_for: list[set[int]] = []
        """Tickets of each caller that waits now."""
        self._given_up: deque[int] = deque()
        """Tickets that nobody wants any more."""

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
        """Forget what is under way for these; some may have ended."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Trajectory]:
        """See `actors.engine.Engine.generate`. Raises ValueError for a request that can never be served."""
        tickets = self._submit(requests, decoding)
        found: dict[int, Trajectory] = {}
        with self._wanted(tickets) as left:
            while left:
                found |= self._fetch(left)
        return [found[ticket] for ticket in tickets]

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Trajectory]:
        """See `actors.engine.Engine.stream`."""
        found = self._stream(self._submit(requests, decoding))
        next(found)  # a generator that was never begun cannot clean up
        return found

    def _stream(self, tickets: Sequence[int]) -> Iterator[Any]:
        """None, and then the trajectories."""
        with self._wanted(tickets) as left:
            yield None
            while left:
                yield from self._fetch(left).values()

    @contextmanager
    def _wanted(self, tickets: Sequence[int]) -> Iterator[set[int]]:
        """The set of what is still wanted; what is left in it at the end is given up."""
        left = set(tickets)
        try:
            yield left
        finally:
            self._given_up.extend(left)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See `actors.engine.Engine.paused`."""
        me = threading.get_ident()
        with self._changed:
            self._pauses += 1  # from here on no round begins, so that the present one is the last
            try:
                self._changed.wait_for(lambda: not self._driving and self._holder in (None, me))
            except BaseException:
                self._resume()
                raise
            outer, self._holder = self._holder, me
        try:
            self._settle()
            yield
        finally:
            with self._changed:
                self._holder = outer
                self._resume()

    def _resume(self) -> None:
        self._pauses -= 1
        self._changed.notify_all()

    def cancel(self, group_ids: Collection[int]) -> None:
        """See `actors.engine.Engine.cancel`."""
        with self.paused():
            tickets = {ticket for ticket, request in self._under_way().items() if request.group_id in group_ids}
            self._drop(tickets)
            self._ended.update({ticket: CancelledError("its group was cancelled") for ticket in tickets})

    def _fetch(self, left: set[int]) -> dict[int, Trajectory]:
        """Take out of ``left`` what has ended, at least one, driving rounds for everybody where nobody else does.

        Raises the RuntimeError that one of them ended with.
        """
        while True:
            with self._changed:
                if self._holder == threading.get_ident() and not self._ready(left):
                    raise RuntimeError("nothing is decoded inside paused(): leave it before waiting for trajectories")
                self._waiting_for.append(left)
                try:
                    self._changed.wait_for(lambda: self._ready(left) or self._may_drive())
                finally:
                    self._waiting_for.remove(left)
                if ready := self._ready(left):
                    outcomes = {ticket: self._ended.pop(ticket) for ticket in ready}
                    self._changed.notify_all()  # another drives from here on
                    break
                self._driving = True
            try:
                self._settle()
                self._guarded_round()
            finally:
                with self._changed:
                    self._driving = False
                    if self._ended or self._pauses:
                        self._changed.notify_all()
        left.difference_update(outcomes)
        found = {}
        for ticket, outcome in outcomes.items():
            if isinstance(outcome, RuntimeError):
                raise outcome
            found[ticket] = outcome
        return found

    def _ready(self, tickets: set[int]) -> list[int]:
        """Those that have ended, in this order; also while a round is under way."""
        return [ticket for ticket in tickets if ticket in self._ended]

    def _may_drive(self) -> bool:
        return not (self._driving or self._pauses or any(map(self._ready, self._waiting_for)))

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

    def _settle(self) -> None:
        """Drop what was given up; no round is under way in another thread."""
        gone = set()
        while self._given_up:
            gone.add(self._given_up.popleft())
        if gone:
            self._drop(gone)
            for ticket in gone:
                self._ended.pop(ticket, None)
