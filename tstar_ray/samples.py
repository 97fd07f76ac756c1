"""Answers as text that shows in which step each token was revealed, for trackers and terminals.

7¹+¹5²=¹ │ 12¹.¹##²##³       raised: the step within its block; │: a block ends
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tstar_ray.trajectory import Group, Trajectory

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def decoder(tokenizer: Any) -> Decode:
    """Of a tokenizer; special tokens are part of what was decoded."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def reveal_text(trajectory: Trajectory, decode: Decode) -> str:
    """The completion, each token followed by its step, blocks apart."""
    t, blocks = trajectory, []
    for begin in range(t.prompt_len // t.block_size * t.block_size, t.prompt_len + t.completion_len, t.block_size):
        first, end = max(begin, t.prompt_len), begin + t.block_size
        steps = t.step_map[first - t.prompt_len : end - t.prompt_len]
        last = min(end, t.prompt_len + t.completion_len)
        texts = [decode([int(token)]).replace("\n", "⏎") for token in t.token_ids[first:last]]
        raised = [str(step).translate(_RAISED) for step in steps - steps.min() + 1]
        blocks.append("".join(text + step for text, step in zip(texts, raised)))
    return " │ ".join(blocks)


def sample_page(groups: Sequence[Group], decode: Decode) -> str:
    """Markdown: question, expected answer and verdict of the first sample of each group, and how it was revealed."""
    pages = []
    for group in groups:
        first = group.samples[0]
        pages.append(
            f"**{_plain(group.problem.question)}**\n\nexpected {_plain(group.problem.answer)}: {first.verdict}\n\n"
            f"{_plain(reveal_text(first.trajectory, decode))}"
        )
    return "\n\n---\n\n".join(pages)


def _plain(text: str) -> str:
    """Without what Markdown would take for its own."""
    return "".join("\\" + c if c in "\\`*_{}[]()#+-!|<>$" else c for c in text.replace("\n", " "))
