"""Problems from anywhere, in a reproducible order, as prompts of token ids.

    arithmetic | .jsonl | .parquet | hub name ──► list[Problem] ──► ProblemStream (shuffled epochs, one cursor)

The order is a function of the seed and the cursor alone, so that a resumed run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tstar_ray import arithmetic
from tstar_ray.config import ARITHMETIC, ConfigError, DataConfig, default_prompt
from tstar_ray.problems import Problem

_ARITHMETIC_POOL = 8192


@dataclass(frozen=True, slots=True)
class PromptedProblem:
    """A problem with its prompt."""

    problem: Problem
    """What is asked."""
    prompt_ids: tuple[int, ...]
    """[P] token ids, chat template applied."""


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """What a run trains on and holds out."""

    train: tuple[PromptedProblem, ...]
    """In source order."""
    held_out: tuple[PromptedProblem, ...]
    """In source order; never trained on."""
    left_out: int
    """Problems whose prompt exceeds data.max_prompt_tokens."""
    shared: int
    """Training problems that were dropped because their question is held out."""


def load_problem_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, held_out: int) -> ProblemSets:
    """Load both sets; raises ConfigError naming the setting, the value and the remedy."""
    train = load_problems(data, data.train, data.train_split, "data.train")
    if data.limit:
        train = train[: data.limit]
    if (data.eval or data.train) == ARITHMETIC:
        evaluate = arithmetic.problems("heldout", held_out)
    elif data.eval:
        evaluate = load_problems(data, data.eval, data.eval_split, "data.eval")
    else:
        count = min(held_out, len(train) // 5)
        if count == 0:
            raise ConfigError(
                f"data.train={data.train}: {len(train)} problems are too few to hold any out; give data.eval"
            )
        train, evaluate = train[:-count], train[-count:]
    evaluate = evaluate[:held_out]
    unseen = {problem.question for problem in evaluate}
    own = [problem for problem in train if problem.question not in unseen]
    if not own:
        raise ConfigError(f"data.eval={data.eval}: holds out every problem of data.train={data.train}; give another")
    shared, train = len(train) - len(own), own
    template = data.prompt or default_prompt(data.train)
    sets = []
    for problems in (train, evaluate):
        prompted = [PromptedProblem(p, encode_prompt(tokenizer, template, p.question)) for p in problems]
        sets.append(tuple(p for p in prompted if len(p.prompt_ids) <= data.max_prompt_tokens))
    left_out = len(train) + len(evaluate) - sum(map(len, sets))
    for name, kept in zip(("data.train", "data.eval"), sets):
        if not kept:
            raise ConfigError(
                f"{name}: no problem is left; {left_out} prompts exceed data.max_prompt_tokens={data.max_prompt_tokens}"
            )
    return ProblemSets(train=sets[0], held_out=sets[1], left_out=left_out, shared=shared)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: str) -> tuple[int, ...]:
    """Token ids of one prompt; the tokenizer's chat template goes around it where it has one."""
    text = template.replace("{question}", question)
    if tokenizer.chat_template is None:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer(chat, add_special_tokens=False)["input_ids"])


def load_problems(data: DataConfig, source: str, split: str, setting: str) -> list[Problem]:
    """All problems of one source; of the built-in task a pool to train on. ``setting`` names the source in errors."""
    if source == ARITHMETIC:
        return arithmetic.problems("train", _ARITHMETIC_POOL)
    rows = read_rows(source, data.subset, split, setting)
    problems = [_problem(row, index, data, f"{setting}={source}") for index, row in enumerate(rows)]
    if not problems:
        raise ConfigError(f"{setting}={source}: holds no problem")
    return problems


def _problem(row: dict[str, Any], index: int, data: DataConfig, source: str) -> Problem:
    for setting in ("question_field", "answer_field"):
        name = getattr(data, setting)
        if row.get(name) in (None, ""):
            raise ConfigError(
                f"{source}: row {index} has no {name!r}; it has {', '.join(map(repr, row))}. Set data.{setting}"
            )
    working, _, answer = str(row[data.answer_field]).rpartition(data.answer_after or "\0")
    return Problem(
        id=str(row.get("id", index)),
        question=str(row[data.question_field]),
        answer=answer.strip(),
        solution=working.strip() or str(row.get("solution", "")),
    )


def read_rows(source: str, subset: str, split: str, setting: str) -> Iterable[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file or a hub data set; ``setting`` names the source in errors."""
    suffix = Path(source).suffix
    if suffix in (".jsonl", ".parquet"):
        if not Path(source).is_file():
            raise ConfigError(f"{setting}={source}: no such file")
        return _read_jsonl(source, setting) if suffix == ".jsonl" else _read_parquet(source, setting)
    if suffix in (".json", ".csv", ".tsv", ".txt") or Path(source).exists():
        raise ConfigError(f"{setting}={source}: give a .jsonl or .parquet file, or a hub name")
    return _read_hub(source, subset, split, setting)


def _read_jsonl(source: str, setting: str) -> Iterable[dict[str, Any]]:
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{setting}={source}: line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ConfigError(f"{setting}={source}: line {number} is not a JSON object")
                yield row


def _read_parquet(source: str, setting: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(source).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{setting}={source}: not readable as Parquet: {error}") from error


def _read_hub(source: str, subset: str, split: str, setting: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{setting}={source}: no such file; to read it as a hub data set run pip install -e '.[hub]'"
        ) from error
    try:
        return datasets.load_dataset(source, subset or None, split=split)
    except Exception as error:  # the hub client raises many classes
        raise ConfigError(f"{setting}={source}: no such file, and not readable from the hub: {error}") from error


class ProblemStream:
    """Endless problems in shuffled epochs. A problem is named by its position in the stream; the next new position
    and those given back are all its state."""

    def __init__(self, problems: Sequence[PromptedProblem], *, seed: int) -> None:
        self._problems, self._seed = problems, seed
        self.cursor = 0
        """The next position that was never taken."""
        self.returned: list[int] = []
        """Positions that were taken and given back, ascending; they come first."""
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[int]:
        """The next ``count`` positions."""
        again, self.returned = self.returned[:count], self.returned[count:]
        fresh = range(self.cursor, self.cursor + count - len(again))
        self.cursor = fresh.stop
        return [*again, *fresh]

    def give_back(self, positions: Iterable[int]) -> None:
        """Have these taken again before any other."""
        self.returned = sorted([*self.returned, *positions])

    def problem(self, position: int) -> PromptedProblem:
        """What stands at a position."""
        epoch, index = divmod(position, len(self._problems))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._problems))
        return self._problems[self._order[index]]
