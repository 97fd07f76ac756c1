"""Verification that cannot hang, and never turns its own failures into zeros.

    verify(items) ──chunk──► worker process: grade, answer, grade, answer …      one socket each
                  ◄─result──   every answer restarts the clock for the next item
                     └─ none before the deadline ──► SIGKILL, verdict timeout, new worker, rest of the chunk again
                     └─ socket closed ─────────────► verdict crashed,        new worker, rest of the chunk again

The deadline of an item runs from when its worker begins it, never while it waits: a long queue cannot time out
(invariant 7). An item that killed a worker is not tried again here; the caller decides what a missing reward
means. Workers are fresh interpreters (no fork, no re-import of the caller's main module) in sessions of their
own, so that Ctrl-C reaches only the caller; they die with the process that started them, even in mid-item.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from reward.grading import Verdict

_CHUNK = 64
_PR_SET_PDEATHSIG = 1


class VerifierError(RuntimeError):
    """The workers cannot run at all: the grader is not importable, or processes do not start."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one verification ended."""

    verdict: Verdict
    """What became of it."""
    seconds: float
    """From when the worker began it."""
    detail: str = ""
    """Why, where the verdict alone does not say."""


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    chunk: list[int] = field(default_factory=list)
    done: int = 0
    began: float = 0.0
    graded: int = 0


class VerifierPool:
    """A fixed number of worker processes; for one calling thread at a time."""

    def __init__(
        self,
        *,
        workers: int = 1,
        deadline_s: float = 10.0,
        grader: str = "reward.grading:grade",
        max_chars: int = 50_000,
        memory_mb: int = 4096,
        max_rss_mb: int = 1024,
        max_items: int = 20_000,
        start_s: float = 60.0,
    ) -> None:
        """``grader`` is (text, answer) -> Verdict as module:name. Texts longer than ``max_chars`` are rejected.
        A worker may map ``memory_mb``; one that holds more than ``max_rss_mb``, or graded ``max_items``, is
        replaced between items. Raises VerifierError when workers do not start within ``start_s``."""
        self._deadline_s, self._start_s = deadline_s, start_s
        self._grader, self._max_chars = grader, max_chars
        self._memory_mb, self._max_rss_mb, self._max_items = memory_mb, max_rss_mb, max_items
        self.counts: Counter[Verdict] = Counter()
        """Verdicts so far."""
        self.replaced = 0
        """Workers killed or lost, recycled ones not counted."""
        self._workers = [self._spawn() for _ in range(workers)]
        try:
            for worker in self._workers:
                self._await_ready(worker)
        except VerifierError:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()

    def verify(self, items: Sequence[tuple[str, str]]) -> list[Result]:
        """One result for each (text, gold answer), in order. Returns in bounded time whatever the items are."""
        if not self._workers:
            results: list[Result | None] = [Result(Verdict.rejected, 0.0, "the pool is closed") for _ in items]
        else:
            results = [self._refusal(text) for text, _ in items]
            self._run(items, results)
        final = [result for result in results if result is not None]
        assert len(final) == len(items)
        self.counts.update(result.verdict for result in final)
        return final

    def _refusal(self, text: str) -> Result | None:
        if len(text) <= self._max_chars:
            return None
        return Result(Verdict.rejected, 0.0, f"{len(text)} characters, at most {self._max_chars}")

    def _run(self, items: Sequence[tuple[str, str]], results: list[Result | None]) -> None:
        todo = deque(i for i, result in enumerate(results) if result is None)
        size = max(1, min(_CHUNK, len(todo) // (4 * len(self._workers))))
        while todo or any(worker.chunk for worker in self._workers):
            for worker in list(self._workers):
                if worker.ready and not worker.chunk and todo:
                    self._send(self._recycled(worker), [todo.popleft() for _ in range(min(size, len(todo)))], items)
            limits = {worker: self._limit(worker) for worker in self._workers if worker.chunk or not worker.ready}
            timeout = max(0.0, min(limits.values()) - time.monotonic())
            heard = wait([worker.connection for worker in limits], timeout=timeout)
            for worker in [w for w in limits if w.connection in heard]:
                self._hear(worker, results, todo)
            for worker, limit in limits.items():
                if worker in self._workers and worker.connection not in heard and limit <= time.monotonic():
                    self._overdue(worker, results, todo)

    def _limit(self, worker: _Worker) -> float:
        return worker.began + (self._deadline_s if worker.ready else self._start_s)

    def _send(self, worker: _Worker, chunk: list[int], items: Sequence[tuple[str, str]]) -> None:
        worker.chunk, worker.done, worker.began = chunk, 0, time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker shows as end of file at the next wait
            worker.connection.send([items[i] for i in chunk])

    def _hear(self, worker: _Worker, results: list[Result | None], todo: deque[int]) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            if not worker.ready:
                raise VerifierError(_why(worker)) from None
            self._lose(worker, Verdict.crashed, _why(worker), results, todo)
            return
        now = time.monotonic()
        if not worker.ready:
            worker.ready = True
            return
        verdict, detail = message
        results[worker.chunk[worker.done]] = Result(verdict, now - worker.began, detail)
        worker.done, worker.began, worker.graded = worker.done + 1, now, worker.graded + 1
        if worker.done == len(worker.chunk):
            worker.chunk = []

    def _overdue(self, worker: _Worker, results: list[Result | None], todo: deque[int]) -> None:
        if not worker.ready:
            raise VerifierError(f"a verifier process did not start within {self._start_s:g} s")
        self._lose(worker, Verdict.timeout, f"no verdict in {self._deadline_s:g} s", results, todo)

    def _lose(
        self, worker: _Worker, verdict: Verdict, detail: str, results: list[Result | None], todo: deque[int]
    ) -> None:
        """Close the item a worker was lost on, put the rest of its chunk back, and start another worker."""
        if worker.chunk:
            seconds = time.monotonic() - worker.began
            results[worker.chunk[worker.done]] = Result(verdict, seconds, detail)
            todo.extendleft(reversed(worker.chunk[worker.done + 1 :]))
        self.replaced += 1
        self._replace(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        self._kill(worker)
        fresh = self._spawn()
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _recycled(self, worker: _Worker) -> _Worker:
        """The worker, or a fresh one in its place when it grew too large or old."""
        try:
            rss_mb = psutil.Process(worker.process.pid).memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            return worker
        if worker.graded < self._max_items and rss_mb < self._max_rss_mb:
            return worker
        fresh = self._replace(worker)
        self._await_ready(fresh)
        return fresh

    def _spawn(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", "from reward.verifier import serve; serve()"],
                env=os.environ
                | {
                    "TSTAR_VERIFIER": f"{theirs.fileno()},{self._memory_mb},{self._grader}",
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "OMP_NUM_THREADS": "1",
                },
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        return _Worker(process, Connection(ours.detach()), began=time.monotonic())

    def _await_ready(self, worker: _Worker) -> None:
        if not worker.connection.poll(self._start_s):
            raise VerifierError(f"a verifier process did not start within {self._start_s:g} s")
        self._hear(worker, [], deque())

    def _kill(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        if worker.process.stderr:
            worker.process.stderr.close()


def _why(worker: _Worker) -> str:
    """How a worker ended, with the last line it wrote."""
    try:
        code = worker.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "closed its socket"
    assert worker.process.stderr is not None
    os.set_blocking(worker.process.stderr.fileno(), False)
    lines = (worker.process.stderr.read() or b"").decode(errors="replace").strip().splitlines()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"worker ended by {how}" + (f": {lines[-1][:300]}" if lines else "")


def load_grader(name: str) -> Callable[[str, str], Verdict]:
    """A grading function by module:name; ValueError with the remedy where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward.grader={name!r} cannot be imported ({error}); write module:function") from error


def serve() -> None:
    """Body of a worker process: receive chunks, send one (verdict, detail) an item, end at end of file."""
    descriptor, memory_mb, grader = os.environ["TSTAR_VERIFIER"].split(",", 2)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_mb) << 20, int(memory_mb) << 20))
    connection = Connection(int(descriptor))
    grade = load_grader(grader)
    connection.send("ready")
    warm_up = getattr(sys.modules[grade.__module__], "warm_up", None)
    if warm_up:
        threading.Thread(target=warm_up, daemon=True).start()
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        for text, answer in chunk:
            connection.send(_grade_one(grade, text, answer))


def _grade_one(grade: Callable[[str, str], Verdict], text: str, answer: str) -> tuple[Verdict, str]:
    try:
        return grade(text, answer), ""
    except MemoryError:
        os._exit(3)  # nothing after this can be relied on
    except BaseException as error:  # some libraries raise BaseException for a time limit of their own
        return Verdict.crashed, f"{type(error).__name__}: {error}"[:300]


def summarise(counts: Counter[Any]) -> dict[str, int]:
    """Every verdict with its count, zeros included."""
    return {verdict.value: counts[verdict] for verdict in Verdict}
