"""Graders that misbehave on request, for worker processes: the completion text says how."""

import ctypes
import os
import re
import signal
import sys
import threading
import time

from reward.grading import Verdict

_KEPT = []


def obey(text: str, answer: str) -> Verdict:
    """Do what ``text`` says; it is correct if it ends in the answer."""
    command, _, argument = text.partition(" ")
    match command:
        case "hang":  # in C, with the GIL held
            re.match(r"(a+)+$", "a" * 60 + "b")
        case "deaf":  # to every signal that a process can ignore
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
        case "spin":
            9**9**9**9
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            sys.exit(3)
        case "raise":
            raise BaseException("not an Exception")
        case "grow":
            while True:
                _KEPT.append(b"x" * 2**22)
                time.sleep(0.005)
        case "keep":
            _KEPT.append(b"x" * (int(argument) << 20))
            time.sleep(0.15)
        case "leap":
            bytearray(2**40)
        case "pause":
            time.sleep(float(argument))
        case "linger":
            threading.Thread(target=_run_for_ever, daemon=True).start()
        case "nonsense":
            return "excellent"  # type: ignore[return-value]
        case "noise":
            print("a library that prints")
    return Verdict.correct if text.endswith(answer) else Verdict.wrong


def _run_for_ever() -> None:
    while True:
        pass
