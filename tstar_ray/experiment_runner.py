"""Commands of an experiment as processes of their own, some at a time; a signal lets those at work save and end."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_POLL_S = 0.2
_KILL_S = 120.0
"""Seconds that a command which was told to stop may take to save."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One command, which continues where it was stopped when it is run again."""

    name: str
    """Shown with whatever becomes of it."""
    log: Path
    """What it printed, all attempts."""
    command: Callable[[], list[str]]
    """Made when it starts."""
    told: Callable[[], str]
    """Its result in one line, once it ended well."""


class Runner:
    """Runs jobs."""

    def __init__(self, *, parallel: int, timeout_s: float, say: Callable[[str], None]) -> None:
        self._parallel, self._timeout_s, self._say = parallel, timeout_s, say
        self._active: dict[Job, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        self.stopped = False
        """A signal came."""

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """To the end of all, or to a signal; returns those that failed."""
        waiting, failed, total = list(jobs), [], len(jobs)
        previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._active or (waiting and not self.stopped):
                while waiting and not self.stopped and len(self._active) < self._parallel:
                    self._start(waiting.pop(0))
                time.sleep(_POLL_S)
                for job, code, seconds in self._ended():
                    left = total - len(waiting) - len(self._active)
                    if code == 0:
                        self._say(f"[{left}/{total}] {job.name} done in {seconds:.0f} s: {job.told()}")
                    elif not (self.stopped and code == 130):
                        failed.append(job)
                        self._say(f"[{left}/{total}] {job.name} FAILED (exit code {code}): {_last_line(job.log)}")
        finally:
            for process, log, _ in self._active.values():
                _kill(process)
                log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return failed

    def _start(self, job: Job) -> None:
        # A session of its own: Ctrl-C on the terminal reaches the command through `_handle`, once.
        log = job.log.open("ab")
        process = subprocess.Popen(job.command(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self._active[job] = (process, log, time.monotonic())
        self._say(f"{job.name} started, output in {job.log}")

    def _ended(self) -> list[tuple[Job, int, float]]:
        found = []
        for job, (process, log, start) in list(self._active.items()):
            code, seconds = process.poll(), time.monotonic() - start
            if code is None and seconds > self._timeout_s:
                self._say(f"{job.name} takes longer than cell_timeout_s={self._timeout_s:g}: stopping it")
                process.terminate()
                try:
                    code = process.wait(timeout=_KILL_S)
                except subprocess.TimeoutExpired:
                    _kill(process)
                code = -signal.SIGTERM
            if code is not None:
                log.close()
                del self._active[job]
                found.append((job, code, seconds))
        return found

    def _handle(self, number: int, _: Any) -> None:
        if not self.stopped:
            self._say(f"{signal.Signals(number).name}: the runs at work finish their update and save")
        self.stopped = True
        for process, _log, _start in self._active.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command of ours; the private cluster it started ends with it."""
    if process.poll() is None:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    return (told or lines or ["it printed nothing"])[-1][:300]
