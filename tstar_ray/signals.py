"""Ctrl-C and SIGTERM end a long command where its work can be saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

_SAME_S = 1.0
"""`timeout` and job managers may send one request twice: to the process and to its group."""


class Stoppable(Protocol):
    """Looks at ``stop_requested`` where it can stop."""

    stop_requested: bool


class StopSignals:
    """First Ctrl-C or SIGTERM: finish the update, save, end. Second, unless within a second: end at once."""

    def __init__(self, controller: Stoppable, say: Callable[[str], None]) -> None:
        self._controller, self._say = controller, say
        self._previous: dict[int, Any] = {}
        self._asked = 0.0

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._controller.stop_requested:
            if now - self._asked < _SAME_S:
                return
            raise KeyboardInterrupt
        self._asked, self._controller.stop_requested = now, True
        self._say(f"{signal.Signals(number).name}: finishing this update, then saving; again to stop at once")
