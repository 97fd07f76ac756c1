"""Problems from files, prompts, held-out splits and reproducible order."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tstar_ray.config import ConfigError, DataConfig
from tstar_ray.data import ProblemStream, PromptedProblem, encode_prompt, load_problem_sets, load_problems
from tstar_ray.model_files import inspect_checkpoint
from tstar_ray.problems import Problem

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return inspect_checkpoint("embedded")[0]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


ROWS = [{"question": f"What is {i}?", "answer": f"so it is\n#### {i}"} for i in range(20)]


def load(source, **settings):
    return load_problems(DataConfig(train=source, **settings), source, "train", "data.train")


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = load(jsonl)
    assert found == load(str(tmp_path / "a.parquet"))
    assert found[3] == Problem("3", "What is 3?", "3", "so it is")


def test_columns_can_have_other_names(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "problem": "1+1?", "final": "2", "solution": "easy"}])
    assert load(source, question_field="problem", answer_field="final") == [Problem("x", "1+1?", "2", "easy")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no problem"),
        ("a.jsonl", "{not json", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.jsonl", '{"q": "1"}', "row 0 has no 'question'; it has 'q'. Set data.question_field"),
        ("a.jsonl", '{"question": "1", "answer": ""}', "row 0 has no 'answer'"),
        ("a.parquet", "junk", "not readable as Parquet"),
        ("a.csv", "question,answer", "give a .jsonl or .parquet file"),
    ],
)
def test_unusable_files_are_named_with_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        load(str(tmp_path / name))
    assert message in str(error.value)
    assert f"data.train={tmp_path / name}" in str(error.value)


def test_a_missing_file_is_no_hub_name():
    with pytest.raises(ConfigError, match=r"data.train=nowhere.jsonl: no such file"):
        load("nowhere.jsonl")


def test_held_out_problems_come_from_the_end_and_are_never_trained_on(tmp_path, tokenizer):
    data = DataConfig(train=write_jsonl(tmp_path / "a.jsonl", ROWS))
    sets = load_problem_sets(data, tokenizer, held_out=100)
    train, held_out = ({p.problem.question for p in s} for s in (sets.train, sets.held_out))
    assert (len(train), len(held_out)) == (16, 4)
    assert not train & held_out


def test_what_data_eval_names_is_never_trained_on(tmp_path, tokenizer):
    sets = load_problem_sets(DataConfig(eval="arithmetic", limit=600), tokenizer, held_out=500)
    assert sets.held_out == load_problem_sets(DataConfig(), tokenizer, held_out=500).held_out
    assert not {p.problem.question for p in sets.train} & {p.problem.question for p in sets.held_out}
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    same = load_problem_sets(DataConfig(train=source, eval=source), tokenizer, held_out=5)
    assert [p.problem.id for p in same.held_out] == list("01234")
    assert [p.problem.id for p in same.train] == [str(i) for i in range(5, 20)]
    assert (same.shared, same.left_out) == (5, 0)
    with pytest.raises(ConfigError, match="holds out every problem of data.train"):
        load_problem_sets(DataConfig(train=source, eval=source), tokenizer, held_out=20)


def test_too_few_problems_to_hold_any_out(tmp_path, tokenizer):
    data = DataConfig(train=write_jsonl(tmp_path / "a.jsonl", ROWS[:4]))
    with pytest.raises(ConfigError, match="4 problems are too few to hold any out; give data.eval"):
        load_problem_sets(data, tokenizer, held_out=100)


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [*ROWS, {"question": "why " * 500, "answer": "1"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    sets = load_problem_sets(DataConfig(train=source, max_prompt_tokens=300), tokenizer, held_out=4)
    assert sets.left_out == 1
    with pytest.raises(ConfigError, match="no problem is left; 21 prompts exceed data.max_prompt_tokens=2"):
        load_problem_sets(DataConfig(train=source, max_prompt_tokens=2), tokenizer, held_out=4)


def test_the_embedded_task_is_prompted_bare_and_other_data_asks_for_a_box(tmp_path, tokenizer):
    embedded = load_problem_sets(DataConfig(), tokenizer, held_out=2).train[0]
    assert tokenizer.decode(embedded.prompt_ids) == embedded.problem.question

    class Recorder:
        chat_template = None

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            self.text = text
            return {"input_ids": [1]}

    recorder = Recorder()
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    load_problem_sets(DataConfig(train=source), recorder, held_out=4)
    assert recorder.text.endswith("put your final answer within \\boxed{}.")


def test_the_chat_template_goes_around_the_prompt(tokenizer):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}Tom has {{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    assert tokenizer.decode(encode_prompt(chatty, "{question}.", "half")) == "Tom has half.?"


def prompted(count):
    return [PromptedProblem(Problem(str(i), "", ""), (i,)) for i in range(count)]


def test_stream_visits_every_problem_once_an_epoch_and_goes_on_from_its_cursor():
    def take(stream, count):
        return [stream.problem(position).problem.id for position in stream.take(count)]

    taken = take(ProblemStream(prompted(7), seed=3), 21)
    for epoch in range(3):
        assert sorted(taken[7 * epoch : 7 * epoch + 7]) == [str(i) for i in range(7)]
    assert taken[:7] != taken[7:14], "epochs are shuffled differently"
    resumed = ProblemStream(prompted(7), seed=3)
    resumed.cursor = 5
    assert take(resumed, 16) == taken[5:]
    assert take(ProblemStream(prompted(7), seed=4), 7) != taken[:7]


def test_invariant_10_what_is_given_back_comes_first_and_nothing_is_taken_twice():
    stream = ProblemStream(prompted(5), seed=3)
    assert stream.take(8) == [0, 1, 2, 3, 4, 5, 6, 7]
    stream.give_back([6, 2])
    stream.give_back([4])
    assert stream.take(2) == [2, 4]
    assert (stream.returned, stream.cursor) == ([6], 8)
    assert stream.take(3) == [6, 8, 9]
    assert [stream.problem(2), stream.problem(9)] == [stream.problem(2), stream.problem(9)], "in any order"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("math500", 500), ("aime24", 30)])
def test_real_data_sets_load(name, count):
    found = load(str(SHARED / f"{name}.jsonl"))
    assert len(found) == count
    assert len({p.id for p in found}) == count
    assert all(p.answer and "####" not in p.answer for p in found)
