"""Training texts of an adaptation: rows of any source become token ids with a prompt length.

    question + solution ──chat template where there is one──► prompt ids | answer ids, to their end-of-text
    plain text ──► ids and end-of-text, cut into pieces of whole blocks

Prompts are those of rollouts later, by default too, and tokenised apart from answers (`tstar_ray.data.encode_prompt`).
Final answers behind a mark, as GSM8K's "#### 72", are trained in the box that verifiers read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from learner.adaptation import Example
from tstar_ray import arithmetic
from tstar_ray.config import ARITHMETIC, ConfigError, default_prompt
from tstar_ray.config_adapt import AdaptDataConfig
from tstar_ray.data import encode_prompt, read_rows

_ARITHMETIC = 20_000


@dataclass(frozen=True, slots=True)
class ExampleSets:
    """What is trained on and what is held out."""

    train: tuple[Example, ...]
    """In source order."""
    held_out: tuple[Example, ...]
    """Never trained on."""
    left_out: int
    """Samples longer than data.max_tokens."""


class Encoder:
    """Rows of one kind of source to examples."""

    def __init__(self, data: AdaptDataConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self._data, self._tokenizer, self._stop_ids = data, tokenizer, set(stop_ids)
        self._prompt = data.prompt or default_prompt(data.train)
        self._end = int(min(stop_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id)

    def pair(self, question: str, solution: str) -> Example:
        """One question with its answer, up to and including the first token that ends it."""
        prompt = encode_prompt(self._tokenizer, self._prompt, question)
        answer = self._ids(self._answer_text(question, self._boxed(solution)))
        stop = next((i for i, token in enumerate(answer) if token in self._stop_ids), len(answer))
        ids = [*prompt, *answer[:stop], answer[stop] if stop < len(answer) else self._end]
        return Example(np.array(ids, dtype=np.int32), len(prompt))

    def pieces(self, text: str, size: int) -> list[Example]:
        """A text in pieces of ``size`` tokens, the last with the end-of-text."""
        ids = [*self._ids(text), self._end]
        return [Example(np.array(ids[i : i + size], dtype=np.int32), 0) for i in range(0, len(ids), size)]

    def _boxed(self, solution: str) -> str:
        working, mark, answer = solution.rpartition(self._data.answer_after or "\0")
        final = answer.strip()
        # A heading of Markdown is such a mark as well, with a text of lines behind it.
        if not mark or not final or "\n" in final or "\\boxed" in solution:
            return solution
        return f"{working}\\boxed{{{final}}}"

    def _answer_text(self, question: str, solution: str) -> str:
        """What the chat template writes after the generation prompt; the bare solution where it has no such form."""
        if self._tokenizer.chat_template is None:
            return solution
        user = {"role": "user", "content": self._prompt.replace("{question}", question)}
        opened = str(self._tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True))
        both = [user, {"role": "assistant", "content": solution}]
        whole = str(self._tokenizer.apply_chat_template(both, tokenize=False))
        return whole.removeprefix(opened) if whole.startswith(opened) else solution

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def load_example_sets(
    data: AdaptDataConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], *, largest_block: int
) -> ExampleSets:
    """Load both sets; raises ConfigError naming the setting, the value and the remedy."""
    encoder = Encoder(data, tokenizer, stop_ids)
    if not data.train:
        raise ConfigError("data.train is empty: give a .jsonl or .parquet file, a hub data set, or arithmetic")
    size = data.max_tokens // largest_block * largest_block
    train = _load(data, data.train, data.train_split, "data.train", encoder, size)
    if data.limit:
        train = train[: data.limit]
    if data.eval or (data.train == ARITHMETIC and not data.text_field):
        held_out = _load(data, data.eval or ARITHMETIC, data.eval_split, "data.eval", encoder, size)[: data.held_out]
    else:
        count = min(data.held_out, len(train) // 5)
        held_out, train = train[len(train) - count :], train[: len(train) - count]
    kept = [tuple(e for e in found if len(e.ids) <= size) for found in (train, held_out)]
    if not kept[0]:
        raise ConfigError(
            f"data.train={data.train}: no sample is left; {len(train)} exceed data.max_tokens={data.max_tokens}"
        )
    return ExampleSets(kept[0], kept[1], len(train) + len(held_out) - len(kept[0]) - len(kept[1]))


def _load(data: AdaptDataConfig, source: str, split: str, setting: str, encoder: Encoder, size: int) -> list[Example]:
    if source == ARITHMETIC:
        if setting == "data.train":
            problems = arithmetic.problems("train", data.limit or _ARITHMETIC, seed=1)
        else:
            problems = arithmetic.problems("heldout", max(1, data.held_out))
        return [encoder.pair(p.question, p.solution) for p in problems]
    rows: Iterable[dict[str, Any]] = read_rows(source, data.subset, split, setting)
    fields = ("text_field",) if data.text_field else ("question_field", "solution_field")
    found: list[Example] = []
    for index, row in enumerate(rows):
        values = []
        for field in fields:
            name = getattr(data, field)
            if row.get(name) in (None, ""):
                raise ConfigError(
                    f"{setting}={source}: row {index} has no {name!r}; it has {', '.join(map(repr, row))}. "
                    f"Set data.{field}"
                )
            values.append(str(row[name]))
        found += encoder.pieces(values[0], size) if data.text_field else [encoder.pair(*values)]
    if not found:
        raise ConfigError(f"{setting}={source}: holds no sample")
    return found
