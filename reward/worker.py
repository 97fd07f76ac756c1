"""One killable grader process: the parent's side, and what runs in the child.

    Worker (parent) ──(text, answer)──► serve (child) ──► grader
           ◄── READY: grader imported; WARM: its warm-up is over; then (verdict, seconds, detail) per item ──┘
           ──── lifeline: nothing is ever written ────►

The child exits when the parent does, however that ends: idle, it reads end-of-file; busy, the kernel ends it by
SIGKILL when the lifeline closes, even in C code that holds the GIL or behind blocked signals.

It is a plain ``python -c`` rather than a ``multiprocessing`` process: those import the parent's main module again,
which under Ray means Ray itself and in a driver torch, in every worker and after every kill. This module and
``reward.grading`` import the standard library alone, so a worker is ready in a tenth of a second.
Linux only: /proc and RLIMIT_AS bound the memory, RLIMIT_CPU what threads do that outlive their item.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Generic, TypeVar

from reward.grading import Verdict

READY, WARM = "ready", "warm"
_PIPE_S = 5  # limit on one read or write: only a stopped process takes longer
_CORES = 4  # that an item may keep busy until its deadline
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pool allows. Each bound ends in a typed verdict, never in a wait."""

    deadline_s: float = 10.0
    """Wall time for one item, from its worker's turn; beyond, the worker is killed: timeout."""
    start_s: float = 30.0
    """Wall time for a worker to start, and again for its warm-up if an item comes to need that."""
    memory_mb: int = 2_048
    """Resident memory at which a busy worker is killed: crashed. Looked at every 0.1 s; the kernel stops a jump
    at ``memory_mb`` + 1 GiB of address space."""
    max_rss_mb: int = 512
    """Resident memory above which a worker is replaced between items (sympy's caches grow)."""
    max_items: int = 20_000
    """Items after which a worker is replaced."""
    max_chars: int = 200_000
    """Text and gold answer together; longer is rejected."""
    max_waiting: int = 4_096
    """Admission: while so many items of other calls wait for a worker, a new call is rejected whole and at once,
    and the caller should slow down. An idle pool admits a call of any size and feeds it to workers as they
    free up, so that no batch is rejected for being large."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class Worker(Generic[T]):
    """The parent's side of one worker process."""

    def __init__(self, grader: str, limits: Limits) -> None:
        self.items: deque[T] = deque()
        """Sent and not answered; it is the first one's turn."""
        self.turn_began = time.monotonic()
        self.ready = False
        """It has imported the grader."""
        self.warm = False
        """Its warm-up is over, so that the deadline applies."""
        self.leaving = False
        """It gets no more items and is replaced after those it has."""
        self.done = 0
        self.pipe, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            with socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
                end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _PIPE_S, 0))
        cpu_s = math.ceil(_CORES * max(limits.deadline_s, limits.start_s))
        arguments = [str(argument) for argument in (theirs.fileno(), lifeline, grader, limits.memory_mb + 1024, cpu_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from reward.worker import serve; serve()", *arguments],
            pass_fds=(theirs.fileno(), lifeline),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print must not get into the parent's standard output
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        theirs.close()
        os.close(lifeline)

    def expires(self, limits: Limits) -> float:
        """Time at which it must be killed if it has not reported."""
        if self.ready and not self.items:
            return float("inf")
        return self.turn_began + (limits.deadline_s if self.warm else limits.start_s)

    def rss_mb(self) -> float:
        # Not ru_maxrss, which a child takes over from its parent, tens of GB in a learner.
        try:
            with open(f"/proc/{self.process.pid}/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize() / 2**20
        except OSError:
            return 0.0  # it has just died, which its pipe reports

    def kill(self) -> None:
        self.process.kill()
        self.pipe.close()
        os.close(self._lifeline)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; subprocess reaps it later
            self.process.wait(timeout=_PIPE_S)


def serve() -> None:
    """A worker process: answer items one by one until the parent closes the pipe."""
    pipe_fd, lifeline, grader, address_mb, cpu_s = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    fcntl.fcntl(int(lifeline), fcntl.F_SETSIG, signal.SIGKILL)  # which no grader can block
    fcntl.fcntl(int(lifeline), fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(int(lifeline), fcntl.F_SETFL, os.O_ASYNC)  # from now on, closing its other end ends this process
    resource.setrlimit(resource.RLIMIT_AS, (int(address_mb) * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe: Connection = Connection(int(pipe_fd))
    sending = threading.Lock()

    def report(message: object) -> None:
        with sending:
            pipe.send(message)

    def warm_up_and_report(warm_up: Callable[[], None]) -> None:
        try:
            warm_up()
        finally:
            report(WARM)

    module_name, function_name = grader.split(":")
    module = importlib.import_module(module_name)
    function: Callable[[str, str], Verdict] = getattr(module, function_name)
    report(READY)
    warm_up: Callable[[], None] | None = getattr(module, "warm_up", None)
    if warm_up:
        threading.Thread(target=warm_up_and_report, args=(warm_up,), daemon=True).start()
    else:
        report(WARM)
    while True:
        # The kernel ends the process past it, between items too; an item is given what all before it have not used.
        used = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + int(cpu_s), resource.RLIM_INFINITY))
        try:
            text, answer = pipe.recv()
        except (EOFError, OSError):
            return
        began = time.perf_counter()
        try:
            verdict, detail = Verdict(function(text, answer)), ""
        except BaseException as error:  # math-verify's TimeoutException, for one, is not an Exception
            verdict, detail = Verdict.crashed, f"{type(error).__name__}: {str(error)[:200]}"
        report((verdict.value, time.perf_counter() - began, detail))
