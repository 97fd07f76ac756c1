"""The built-in task: right answers, disjoint splits, a tokenizer that loses nothing, a small start model."""

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tstar_ray.arithmetic import problems, split_of
from tstar_ray.embedded.make import make_tokenizer
from tstar_ray.model_files import EMBEDDED_FOLDER

SOME = problems("train", 3000)


def test_the_working_is_right_and_ends_in_the_answer():
    for problem in SOME:
        *equations, box = problem.solution.split(";")
        assert 3 <= len(equations) <= 6
        value = None
        for equation in equations:
            left, right = equation.split("=")
            a, operator, b = re.fullmatch(r"(\d\d)([-+*/])(\d\d)", left).groups()
            assert value is None or int(a) == value, "each step starts from the result before"
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operator]
            assert value == int(right)
            assert 1 <= value <= 99
        assert box == f"\\boxed{{{problem.answer}}}"
        assert int(problem.answer) == value


def test_the_question_asks_what_the_working_computes():
    """Read back from the sentences with a few lines of Python."""
    for problem in SOME[:500]:
        hero = problem.question.split()[0]
        value = None
        for name, verb, what in re.findall(r"(\w+) (\w+) (\w+)[ .]", problem.question):
            if name != hero or verb == "many":
                continue
            if verb == "has":
                value = int(what)
            elif verb in ("doubles", "triples"):
                value *= {"doubles": 2, "triples": 3}[verb]
            elif what == "half":
                value //= 2
            else:
                value += int(what) if verb in ("buys", "finds", "gets", "wins") else -int(what)
        assert str(value) == problem.answer, problem


def test_splits_never_share_a_question():
    held_out = problems("heldout", 1000)
    assert not {p.question for p in SOME} & {p.question for p in held_out}
    assert {split_of(p.question) for p in held_out} == {"heldout"}
    with pytest.raises(ValueError, match="split='test'; choose train or heldout"):
        problems("test", 1)


def test_problems_are_distinct_and_the_same_every_time():
    assert problems("train", 3000) == SOME
    assert len({p.question for p in SOME}) == len({p.id for p in SOME}) == 3000
    assert {p.question for p in problems("train", 100, seed=1)} != {p.question for p in SOME[:100]}


def test_the_tokenizer_loses_nothing():
    shipped = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    assert shipped.get_vocab() == make_tokenizer().get_vocab()
    lengths = []
    for problem in SOME:
        for text in (problem.question, problem.solution):
            ids = shipped(text)["input_ids"]
            assert shipped.unk_token_id not in ids
            assert shipped.decode(ids) == text
        lengths.append(len(ids))
    assert 28 <= min(lengths) < max(lengths) <= 64
    residues = {len(shipped(p.question)["input_ids"]) % 16 for p in SOME}
    assert residues == set(range(16)), "prompts end anywhere in a block"


def test_the_start_model_is_small_and_opens_with_plain_transformers():
    assert sum(f.stat().st_size for f in EMBEDDED_FOLDER.iterdir() if f.is_file()) < 3_000_000
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER)
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    assert model.config.block_size == 4
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).mask_token_id
