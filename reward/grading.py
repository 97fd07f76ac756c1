"""What a completion's answer is worth: a pure function, no processes and no clocks.

    completion text ──extract_boxed──► answer ──identical? both plain numbers?──► correct / wrong   (microseconds)
                                         └── otherwise ──math-verify (sympy)──► correct / wrong     (milliseconds)

A ``Verdict`` says what happened, and ``Verdict.reward`` what it is worth. Two kinds must never be mixed: the
model's own failures (wrong, or nothing to parse) earn 0, failures of the verifier (timeout, crashed, rejected)
earn nothing at all, so that load never turns into label noise (invariant 7, "failure is not zero").

``grade`` may run as long as sympy likes: math-verify's own guards are off, because SIGALRM works in main threads
only and sympy has been seen to spin past it. ``reward.verifier`` bounds it from outside, with SIGKILL.
"""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_ANSWER_CHARS = 2_000
"""A longer boxed answer that is not literally the gold answer is unparsable; gold answers of MATH end at 157."""


class Verdict(StrEnum):
    """How the grading of one completion ended."""

    correct = "correct"
    """The boxed answer equals the gold answer."""
    wrong = "wrong"
    """It does not."""
    unparsable = "unparsable"
    """The completion has no boxed answer, or one that is not mathematics: the model's own failure."""
    timeout = "timeout"
    """The verifier ran past its deadline on this item."""
    crashed = "crashed"
    """The verifier failed on this item: an exception, a dead process, or too much memory."""
    rejected = "rejected"
    """The verifier did not try: too long an input, too many items waiting, or the pool was closed."""

    @property
    def reward(self) -> float | None:
        """1 or 0, or None where the verifier failed and nothing is known about the answer."""
        if self is Verdict.correct:
            return 1.0
        return 0.0 if self in (Verdict.wrong, Verdict.unparsable) else None


def extract_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces matched, or None. One pass, whatever the nesting.

    Of nested boxes the innermost counts, and a last box that was cut off gives way to the one before it.
    """
    if "\\boxed" not in text:
        return None
    opened: list[int] = []  # for each open brace, where the content of its box starts; -1 if it is not a box's
    start, end = -1, -1
    for token in _BRACES.finditer(text):
        kind = token[0]
        if kind == "}":
            if opened and (begin := opened.pop()) > start:
                start, end = begin, token.start()
        elif kind[-1] == "{" and kind != "\\{":
            opened.append(token.end() if len(kind) > 1 else -1)
    return text[start:end] if start >= 0 else None


def grade(text: str, answer: str) -> Verdict:
    """Verdict on completion ``text`` for gold ``answer``; ValueError for a gold answer that cannot be compared.

    The fast path is sound: it says correct only for notations of one and the same thing, and wrong only for two
    exact rationals, or two decimals, that differ. What it cannot decide goes to math-verify.
    """
    gold = _normalise(answer)
    if not gold:
        raise ValueError(f"empty gold answer {answer!r}")
    boxed = extract_boxed(text)
    given = _normalise(boxed) if boxed is not None else ""
    if not given:
        return Verdict.unparsable
    if given == gold:
        return Verdict.correct
    if len(given) > MAX_ANSWER_CHARS:
        return Verdict.unparsable
    given_value, gold_value = _rational(given), _rational(gold)
    if given_value is not None and gold_value is not None:
        if given_value == gold_value:
            return Verdict.correct
        # A decimal may round a fraction (0.333333 for 1/3): how closely it must is math-verify's to say.
        if _is_fraction(given) == _is_fraction(gold):
            return Verdict.wrong
    return _grade_symbolically(given, gold)


def check_gold(answer: str) -> None:
    """Raise ValueError unless ``answer`` can serve as a gold answer.

    For loaders: an answer that math-verify cannot parse would make every other notation of it wrong.
    """
    gold = _normalise(answer)
    if not gold or len(gold) > MAX_ANSWER_CHARS:
        raise ValueError(f"gold answer of {len(gold)} characters: {answer[:80]!r}")
    if _rational(gold) is None:
        _parse_gold(gold)


def warm_up() -> None:
    """Import sympy ahead of the first answer that needs it, at leisure and in any thread."""
    import math_verify  # noqa: F401


_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace, \{ or \}, groups nothing
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))", re.ASCII)
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!\s*|\{,\})(?=\d{3})")
_SPACING = re.compile(r"(?<!\\)\\[!,:; ]|~|\s+")
_SIZED = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_PADDING = re.compile(r" ?([^\w\\ ]) ?")


def _normalise(answer: str) -> str:
    """The same LaTeX in one notation of many. A space stays where it separates words, numbers or commands."""
    answer = answer.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    answer = _SPACING.sub(" ", _THOUSANDS.sub("", answer.replace("\\$", "")))
    answer = _PADDING.sub(r"\1", _SIZED.sub("", answer))
    return answer.strip("$ ").rstrip(".,; ")


def _is_fraction(answer: str) -> bool:
    return "/" in answer or "\\" in answer


def _rational(answer: str) -> Fraction | None:
    """Exact value of a plain integer, decimal or fraction of integers."""
    if _NUMBER.fullmatch(answer):
        return Fraction(answer.replace(",", ""))
    if (match := _FRACTION.fullmatch(answer)) is None:
        return None
    numerator, denominator = match[2] or match[4], match[3] or match[5]
    return Fraction(int(match[1] + numerator), int(denominator)) if int(denominator) else None


def _grade_symbolically(given: str, gold: str) -> Verdict:
    from math_verify import verify

    gold_parsed = _parse_gold(gold)
    given_parsed = _parse(given)
    if not given_parsed:
        return Verdict.unparsable
    try:
        equal = verify(gold_parsed, given_parsed, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise  # the verifier ran out of room: nothing is known about the answer
    except Exception:
        return Verdict.wrong  # sympy cannot even relate the two, say a set and a matrix
    return Verdict.correct if equal else Verdict.wrong


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list[Any]:
    """Parsed gold answer, kept because all completions of a group share it."""
    parsed = _parse(gold)
    if not parsed:
        raise ValueError(f"gold answer cannot be parsed: {gold[:80]!r}")
    return parsed


def _parse(answer: str) -> list[Any]:
    """[the sympy object], or [] if ``answer`` is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    # No fallback to strings: the library cuts some to pieces ("a + b + c" becomes "a +") and compares those.
    return parse(
        f"\\boxed{{{answer}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # its documented "no limit"
    )
