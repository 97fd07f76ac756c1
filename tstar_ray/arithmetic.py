"""The built-in task: endless word problems with step-by-step working and a boxed answer. Pure Python.

    Mia has 12 pens. Mia buys 5. Mia triples them. Tom has 8 cards. Mia loses 20. How many pens?
    12+05=17;17*03=51;51-20=31;\\boxed{31}

A chain of 3 to 6 operations on a number between 1 and 99, written as one equation a step with two-digit
operands, so that the working is regular and its digits depend on one another: what a block-diffusion decoder
that reveals several tokens at once gets wrong. Some problems hold a sentence that does not matter.

A question is either training or held out, decided by a hash of its text, so the splits can never share one.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Literal

from tstar_ray.problems import Problem

Split = Literal["train", "heldout"]

NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Leo")
THINGS = ("pens", "cards", "apples", "coins", "books", "shells", "stamps", "balls")
GAIN = ("buys", "finds", "gets", "wins")
LOSS = ("loses", "sells", "eats", "drops")
SCALE = {"doubles": 2, "triples": 3}
MOST = 99
_HELD_OUT_SHARE = 8


def problems(split: Split, count: int, *, seed: int = 0) -> list[Problem]:
    """``count`` distinct problems of one split; the same for the same arguments."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}; choose train or heldout")
    rng = random.Random(f"{split}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        question, solution, answer = _chain(rng)
        if split_of(question) == split and question not in found:
            found[question] = Problem(f"{split}-{seed}-{len(found)}", question, str(answer), solution)
    return list(found.values())


def split_of(question: str) -> Split:
    """Where a question belongs: one in eight is held out, whoever asks."""
    return "train" if blake2b(question.encode(), digest_size=1).digest()[0] % _HELD_OUT_SHARE else "heldout"


def _chain(rng: random.Random) -> tuple[str, str, int]:
    """One question, its working, and its answer."""
    name, other = rng.sample(NAMES, 2)
    thing, other_thing = rng.sample(THINGS, 2)
    value = rng.randint(2, 40)
    sentences = [f"{name} has {value} {thing}."]
    working = ""
    for _ in range(rng.randint(3, 6)):
        verb, symbol, operand = _operation(rng, value)
        what = "them" if verb in SCALE else "half" if symbol == "/" else str(operand)
        sentences.append(f"{name} {verb} {what}.")
        result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[symbol]
        working += f"{value:02d}{symbol}{operand:02d}={result:02d};"
        value = result
    if rng.random() < 0.3:
        sentences.insert(rng.randint(1, len(sentences)), f"{other} has {rng.randint(2, 40)} {other_thing}.")
    question = " ".join(sentences) + f" How many {thing}?"
    return question, f"{working}\\boxed{{{value}}}", value


def _operation(rng: random.Random, value: int) -> tuple[str, str, int]:
    """Verb, symbol and operand of a step that keeps the value between 1 and 99."""
    choices: list[tuple[str, str, int]] = []
    if value < MOST:
        choices += [(rng.choice(GAIN), "+", rng.randint(1, min(MOST - value, 40)))] * 2
    if value > 1:
        choices += [(rng.choice(LOSS), "-", rng.randint(1, min(value - 1, 40)))] * 2
    choices += [(verb, "*", factor) for verb, factor in SCALE.items() if value * factor <= MOST]
    if value % 2 == 0:
        choices.append((rng.choice(LOSS), "/", 2))
    return rng.choice(choices)
