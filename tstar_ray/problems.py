"""What is trained on: problems with a checkable final answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One question whose final answer can be verified."""

    id: str
    """Unique in its data set; the key of the accounting and of per-sample seeds."""
    question: str
    """What the model is asked, without any chat template."""
    answer: str
    """The final answer alone, e.g. ``27`` or ``\\frac{1}{2}``."""
    solution: str = ""
    """The working that ends in the answer, where the source has it (used by SFT only)."""
