"""Where an actor runs: for logs, for people who look for a process, and for tests that end one."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a run."""

    name: str
    """As shown on the Ray dashboard."""
    node: str
    """Host name."""
    pid: int
    """Process id there."""
    log: str = ""
    """File there that holds what it prints to standard error; empty where that is no file."""


def here(name: str) -> Place:
    """The calling process."""
    try:
        log = os.readlink("/proc/self/fd/2")
    except OSError:  # not on Linux
        log = ""
    return Place(name, platform.node(), os.getpid(), log if os.path.isfile(log) else "")
