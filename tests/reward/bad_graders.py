"""Graders that misbehave on request, for worker processes: the completion text says how."""

import ctypes
import os
import re
import signal
import sys
import time

from reward.grading import Verdict


def obey(text: str, answer: str) -> Verdict:
    """Do what ``text`` says; anything else is correct."""
    command, _, argument = text.partition(" ")
    match command:
        case "hang":  # in C, with the GIL held, deaf to SIGALRM
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            if argument:
                _announce(argument)
            re.match(r"(a+)+$", "a" * 60 + "b")
        case "sleep":
            _announce(argument)
            time.sleep(600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            sys.exit(3)
        case "raise":
            raise BaseException("not an Exception")
        case "grow":
            kept = []
            while True:
                kept.append(b"x" * 2**22)
                time.sleep(0.001)
        case "leap":
            bytearray(2**40)
        case "pause":
            time.sleep(float(argument))
        case "nonsense":
            return "excellent"  # type: ignore[return-value]
        case "noise":
            print("a library that prints")
    return Verdict.correct


def _announce(path: str) -> None:
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
