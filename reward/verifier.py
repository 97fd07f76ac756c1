"""A pool of processes that can be killed, for graders that can hang, crash or eat the memory.

    verify / submit ──inbox──► dispatcher thread ──one pipe each──► worker processes ──► grader(text, answer)
         ▲                       │  deadline per item, SIGKILL,         │
         └────── Future ◄────────┘  respawn, recycle     ◄──── one message per item

The dispatcher thread owns the workers; nothing else touches them, so there are no locks around processes.
  * It waits for messages from workers, for new items and for the nearest deadline, whichever comes first.
  * A deadline counts from the moment an item is its worker's turn: time spent waiting behind others, starting a
    worker or importing sympy never counts, so load cannot fail a correct answer.
  * An overrun is ``timeout``, a worker's death or an exception in the grader is ``crashed``, each for exactly that
    item. It is never tried again: what hung once hangs twice. Items behind it go to other workers, unblamed.
  * What the pool will not try is ``rejected``. Each outcome is counted; failures have no reward (invariant 7).

Every call therefore ends: its items are bounded in time one by one, and if workers cannot start at all the pool
breaks with RuntimeError instead of waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import wait

from reward.grading import Verdict
from reward.worker import READY, WARM, Limits, Worker

__all__ = ["Limits", "Result", "VerifierPool"]


@dataclass(frozen=True, slots=True)
class Result:
    """How one item ended."""

    verdict: Verdict
    """One of six outcomes; ``verdict.reward`` is what it is worth."""
    seconds: float
    """Grading time, 0 if rejected; without the wait for a worker."""
    detail: str = ""
    """Why, for outcomes that are not a grader's plain answer."""


class VerifierPool:
    """``workers`` killable processes running ``grader``, a "module:function" of (text, answer) -> Verdict.

    The grader's module must be importable with the parent's ``sys.path``. If it has a function ``warm_up()``, each
    worker runs that in the background from its start. All methods may be called from any thread.
    """

    def __init__(self, workers: int = 2, *, grader: str = "reward.grading:grade", limits: Limits | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if len(grader.split(":")) != 2:
            raise ValueError(f'grader must be "module:function", not {grader!r}')
        self.grader = grader
        self.limits = limits or Limits()
        self._size = workers
        self._workers: list[Worker[_Item]] = []
        self._waiting: deque[_Item] = deque()
        """Admitted, not yet with a worker; the dispatcher's own."""
        self._inbox: deque[_Item] = deque()
        self._barren = 0
        """Workers in a row that died before they were warm, with no item to blame."""
        self._respawns: Counter[str] = Counter()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        """Guards what callers share with the dispatcher: the rest of these, and the ends of calls."""
        self._closed = False
        self._unassigned = 0
        self._counts: Counter[Verdict] = Counter()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._dispatch_until_closed, name="verifier-pool", daemon=True)
        self._thread.start()

    # -- callers ---------------------------------------------------------------------------------------------

    def submit(self, items: Sequence[tuple[str, str]]) -> Future[list[Result]]:
        """Admit (completion text, gold answer) pairs; the future holds one result each, in order."""
        call = _Call(len(items))
        call.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only awaited
        admitted: list[_Item] = []
        rejected: list[tuple[_Item, str]] = []
        with self._lock:
            if self._closed:
                raise RuntimeError(str(self._failure or "the verifier pool is closed")) from self._failure
            overloaded = self._unassigned >= self.limits.max_waiting
            for place, (text, answer) in enumerate(items):
                item = _Item(text, answer, call, place)
                if len(text) + len(answer) > self.limits.max_chars:
                    rejected.append((item, f"{len(text) + len(answer)} characters"))
                elif overloaded:
                    rejected.append((item, f"{self._unassigned} items waiting"))
                else:
                    admitted.append(item)
            if admitted:
                self._unassigned += len(admitted)
                self._inbox.extend(admitted)
                os.eventfd_write(self._wake, 1)
        for item, reason in rejected:
            self._finish(item, Result(Verdict.rejected, 0.0, reason))
        if not items:
            call.future.set_result([])
        return call.future

    def verify(self, items: Sequence[tuple[str, str]]) -> list[Result]:
        """``submit`` and wait."""
        future = self.submit(items)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("the verifier pool's dispatcher is gone") from self._failure

    @property
    def counts(self) -> dict[Verdict, int]:
        """Items ended so far, by verdict."""
        with self._lock:
            return {verdict: self._counts[verdict] for verdict in Verdict}

    @property
    def respawns(self) -> dict[str, int]:
        """Workers replaced so far, by reason: timeout, died, memory, recycled."""
        return {reason: self._respawns[reason] for reason in ("timeout", "died", "memory", "recycled")}

    @property
    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [worker.process.pid for worker in list(self._workers)]

    @property
    def waiting(self) -> int:
        """Items admitted that no worker has yet."""
        with self._lock:
            return self._unassigned

    def close(self) -> None:
        """Reject what is unfinished and end the workers. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=10.0)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- dispatcher thread -----------------------------------------------------------------------------------

    def _dispatch_until_closed(self) -> None:
        try:
            self._workers = [Worker[_Item](self.grader, self.limits) for _ in range(self._size)]
            while not self._closed:
                self._assign()
                ready = wait([self._wake, *(worker.pipe for worker in self._workers)], timeout=self._patience())
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                while self._inbox:
                    self._waiting.append(self._inbox.popleft())
                for worker in [worker for worker in self._workers if worker.pipe in ready]:
                    self._receive(worker)
                self._end_overruns()
        except BaseException as failure:
            self._failure = failure
        finally:
            with self._lock:
                self._closed = True
                os.close(self._wake)
            for worker in self._workers:
                worker.kill()
            assigned = [item for worker in self._workers for item in worker.items]
            self._workers = []
            for item in [*assigned, *self._waiting, *self._inbox]:
                self._finish(item, Result(Verdict.rejected, 0.0, "the pool closed"))

    def _assign(self) -> None:
        """Give waiting items to workers: one each to work on, then one more to have at hand."""
        for depth in range(_DEPTH):
            for worker in list(self._workers):
                if not self._waiting:
                    return
                # A long text goes to an idle worker, which reads at once: it may not fit the pipe's buffer.
                long = len(self._waiting[0].text) > _LONG_TEXT
                if not worker.ready or worker.leaving or len(worker.items) != depth or (long and depth):
                    continue
                item = self._waiting.popleft()
                try:
                    worker.pipe.send((item.text, item.answer))
                except OSError:  # it has died, or does not read
                    self._waiting.appendleft(item)
                    self._fail(worker, Verdict.crashed, "died", "the worker process died")
                    continue
                worker.items.append(item)
                if depth == 0:
                    worker.turn_began = time.monotonic()
                with self._lock:
                    self._unassigned -= 1

    def _receive(self, worker: Worker[_Item]) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._fail(worker, Verdict.crashed, "died", "the worker process died")
            return
        worker.turn_began = time.monotonic()
        if message == READY:
            worker.ready = True
        elif message == WARM:
            worker.warm = True
            self._barren = 0
        else:
            verdict, seconds, detail = message
            worker.done += 1
            self._barren = 0
            self._finish(worker.items.popleft(), Result(Verdict(verdict), seconds, detail))
            worker.leaving |= worker.done >= self.limits.max_items
            if worker.done % 64 == 0 or seconds > _LOOK_S:
                worker.leaving |= worker.rss_mb() > self.limits.max_rss_mb
        if worker.leaving and not worker.items:
            self._replace(worker, "recycled")

    def _end_overruns(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now > worker.expires(self.limits):
                if not worker.pipe.poll(0):  # else it has answered while this thread was busy
                    detail = f"no answer in {now - worker.turn_began:.1f} s"
                    self._fail(worker, Verdict.timeout, "timeout", detail)
            elif worker.items and now > worker.turn_began + _LOOK_S:
                rss_mb = worker.rss_mb()
                if rss_mb > self.limits.memory_mb:
                    self._fail(worker, Verdict.crashed, "memory", f"{rss_mb:.0f} MB of memory")

    def _patience(self) -> float:
        """Seconds after which to look at workers even if none reports."""
        soonest = min(worker.expires(self.limits) for worker in self._workers) - time.monotonic()
        busy = any(worker.items for worker in self._workers)
        return min(max(soonest, 0.0), _LOOK_S if busy else 1.0)

    def _fail(self, worker: Worker[_Item], verdict: Verdict, reason: str, detail: str) -> None:
        """Replace a worker that failed. The item whose turn it was ends; those behind it wait again."""
        if worker.items:
            seconds = time.monotonic() - worker.turn_began
            self._finish(worker.items.popleft(), Result(verdict, seconds, detail))
        elif not worker.warm:
            self._barren += 1
            if self._barren >= _BARREN_LIMIT:
                raise RuntimeError(f"workers for {self.grader!r} do not start; their stderr says why")
        self._replace(worker, reason)

    def _replace(self, worker: Worker[_Item], reason: str) -> None:
        worker.kill()
        self._respawns[reason] += 1
        self._waiting.extendleft(reversed(worker.items))
        with self._lock:
            self._unassigned += len(worker.items)
        self._workers[self._workers.index(worker)] = Worker[_Item](self.grader, self.limits)

    def _finish(self, item: _Item, result: Result) -> None:
        """End an item once and for all, and its call with its last one."""
        call = item.call
        with self._lock:
            self._counts[result.verdict] += 1
            call.results[item.place] = result
            call.left -= 1
            ended = call.left == 0
        if not ended:
            return
        if self._failure is not None:
            call.future.set_exception(self._failure)
        else:
            call.future.set_result(call.results)


_DEPTH = 2  # items a worker holds: one at work and one at hand, which hides the round trip
_LONG_TEXT = 16_384  # characters; two shorter ones fit the buffer of a pipe whatever they hold
_LOOK_S = 0.1  # how often a busy worker's memory is looked at
_BARREN_LIMIT = 5


class _Call:
    """One ``submit``."""

    def __init__(self, size: int) -> None:
        self.future: Future[list[Result]] = Future()
        self.results = [Result(Verdict.rejected, 0.0)] * size
        self.left = size


@dataclass(frozen=True, slots=True)
class _Item:
    text: str
    answer: str
    call: _Call
    place: int
    """Index in the call."""
