"""The faults of `benchmarks.chaos`: whom they hit, that they really happened, and when the run is whole again.

    kind ──► victim (from status.json, or its child processes) ──► signal ──► it is gone, or it stands still
                                                                        └──► whole again, without the victim

A process is touched only if its environment carries the mark of the cluster that `benchmarks.chaos` started.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.simulated_cluster import MARK
from cluster.scale import read_status

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
KINDS: dict[str, tuple[str, signal.Signals, int]] = {
    "rollout actor killed": ("rollout", KILL, 24),
    "rollout actor stopped": ("rollout", STOP, 10),
    "reward actor killed": ("reward", KILL, 8),
    "reward actor stopped": ("reward", STOP, 4),
    "verifier killed": ("verifier", KILL, 24),
    "verifier stopped": ("verifier", STOP, 6),
    "learner rank killed": ("learner", KILL, 8),
    "learner rank stopped": ("learner", STOP, 4),
    "driver killed": ("driver", KILL, 5),
    "driver stopped for a while": ("driver", STOP, 3),
    "node lost": ("node", KILL, 4),
}
"""Role, signal, and how often of a hundred times."""
_SEEN_S = 10.0


@dataclass(slots=True)
class Fault:
    """One fault."""

    kind: str
    """Of `KINDS`."""
    pids: tuple[int, ...]
    """Processes that must not serve afterwards; empty for a driver that goes on."""
    began: float
    """Monotonic time."""
    recovered_s: float | None = None
    """Seconds until the run was whole again."""

    @property
    def role(self) -> str:
        """Whom it hit."""
        return KINDS[self.kind][0]


def draw_kinds(count: int, seed: int) -> list[str]:
    """Every kind once as far as ``count`` goes, then by their weights, in an order of the seed."""
    chance = random.Random(seed)
    names = list(KINDS)
    kinds = chance.sample(names, min(count, len(names)))
    kinds += chance.choices(names, [KINDS[name][2] for name in names], k=count - len(kinds))
    chance.shuffle(kinds)
    return kinds


def ours(pid: int) -> psutil.Process | None:
    """The process, if it runs and belongs to the cluster under test."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and MARK in process.environ():
            return process
    return None


def verifiers(reward_pid: int) -> list[int]:
    """Verifier processes of a reward actor."""
    with suppress(psutil.Error):
        children = psutil.Process(reward_pid).children()
        return [child.pid for child in children if "reward.worker" in " ".join(child.cmdline())]
    return []


def victims(role: str, status: Mapping[str, Any]) -> list[int]:
    """Processes of a role that could be hit now."""
    if role == "driver":
        found = [status["driver"]["pid"]]
    elif role == "verifier":
        found = [pid for actor in status["reward"]["actors"].values() for pid in verifiers(actor["pid"])]
    else:
        found = [actor["pid"] for actor in status[role]["actors"].values()]
    return [pid for pid in found if ours(pid)]


def send(pid: int, what: signal.Signals) -> None:
    """Signal a process and see that it is gone, or stands still; AssertionError if neither comes true.
    ProcessLookupError if it ended by itself before it could be hit."""
    process = ours(pid)
    if process is None:
        raise ProcessLookupError(pid)
    process.send_signal(what)
    deadline = time.monotonic() + _SEEN_S
    while time.monotonic() < deadline:
        if what == KILL and ours(pid) is None:
            return
        if what == STOP:
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    return
        time.sleep(0.01)
    raise AssertionError(f"{what.name} to process {pid} had no effect in {_SEEN_S:g} s")


def is_whole(folder: Path, driver_pid: int, workers: int, ranks: int) -> set[int] | None:
    """Processes that serve if the run is whole: the driver runs, every wanted actor works, every reward actor has
    its verifiers, the learner all its ranks; None otherwise."""
    try:
        status = read_status(folder)
    except OSError:
        return None
    if status["driver"]["pid"] != driver_pid:
        return None
    serving = {driver_pid}
    for role in ("rollout", "reward"):
        live, actors = status[role]["live"], status[role]["actors"]
        if len(live) != status[role]["wanted"] or not set(live) <= set(actors):
            return None
        serving |= {actors[name]["pid"] for name in live}
    learner = {actor["pid"] for actor in status["learner"]["actors"].values()}
    for actor in status["reward"]["actors"].values():
        found = verifiers(actor["pid"])
        if len(found) != workers:
            return None
        serving |= set(found)
    serving |= learner
    if len(learner) != ranks or any(ours(pid) is None for pid in serving):
        return None
    return serving
