"""What a user reads after a mistake: the value, what is wrong with it, and the remedy; and nothing is started."""

import json
import shlex

import pytest
import yaml
from trainers import make_groups

from actors import kernels
from tstar_ray import evaluate, run
from tstar_ray.traces import Origin, write_traces

ROW = '{"question": "1+1", "answer": "2"}\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with damaged and misleading files."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in {
        "broken.yaml": "run: [1\n",
        "list.yaml": "- 1\n",
        "broken.jsonl": ROW + '{"question": \n',
        "columns.jsonl": '{"q": "1+1", "a": "2"}\n',
        "empty.jsonl": "",
        "numbers.jsonl": "[1, 2]\n",
        "one.jsonl": ROW,
        "text.parquet": "no",
        "rows.csv": "question,answer\n",
        "a_file": "",
    }.items():
        (folder / name).write_text(text)
    for name, file, content in [
        ("held", "config.yaml", "{}"),
        ("held", "metrics.jsonl", '{"kind": "evaluation"}'),
        ("gpt2", "config.json", json.dumps({"model_type": "gpt2"})),
        ("run", "config.yaml", "{data: {train: train.jsonl}}"),
        ("run/final", "config.json", "{}"),
    ]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(content)
    (folder / "nothing").mkdir()
    write_traces(folder / "good.parquet", make_groups(1), Origin("b4", 3))
    return folder


MISTAKES = [
    # settings
    ("rollout.problem=3", "rollout.problem: unknown setting; did you mean problems?"),
    ("rolout.problems=3", "rolout: unknown setting; did you mean rollout?"),
    ("rollout.problems=many", "rollout.problems='many': input should be a valid integer"),
    ("rollout.problems=0", "rollout.problems=0: input should be greater than or equal to 1"),
    ("rollout.temperature=-1", "rollout.temperature=-1: input should be greater than 0"),
    ("actors", "'actors' is no setting; write section.key=value, e.g. actors.count=4"),
    ("--config P/none.yaml", "--config P/none.yaml: no such file"),
    ("--config P/broken.yaml", "--config P/broken.yaml: not readable as YAML"),
    ("--config P/list.yaml", "--config P/list.yaml: expected sections with settings, found a list"),
    ("curriculum.mode=star", "curriculum.mode='star': input should be 'tstar', 'direct' or 'fixed'"),
    ("curriculum.blocks=[8,4]", "curriculum.blocks=[8, 4]: 4 after 8 does not grow"),
    ("curriculum.updates=[1,2]", "curriculum.updates=[1, 2]: give one number or one for each of the 3 blocks"),
    ("curriculum.updates=[0]", "curriculum.updates=[0]: none may be negative, and one must be positive"),
    ("rollout.max_new_tokens=8", "rollout.max_new_tokens=8 cannot hold a block of 16"),
    ("eval.blocks=[4,128]", "rollout.max_new_tokens=96 cannot hold a block of 128"),
    ("model.dtype=bfloat16", "model.dtype=bfloat16 trains 7 to 15 times slower than float32 on CPU; use auto"),
    ("actors.gpus=1", "actors.gpus=1 and learner.gpus=0: with auto the actors and the learner would differ"),
    ("learner.offload=all", "learner.offload=all needs zero_stage=3, not 1; use offload=optimizer"),
    ("learner.loss.accuracy_band=[0.8,0.2]", "learner.loss.accuracy_band=[0.8, 0.2]: give two numbers low < high"),
    (
        "learner.loss.trace=random learner.loss.correction.level=token",
        "learner.loss.correction.level=token needs loss.trace=trace",
    ),
    ("learner.steps_per_update=4096", "learner.steps_per_update=4096 exceeds the 512 samples of an update"),
    ("data.prompt=hello", "data.prompt='hello': needs the placeholder {question}"),
    (
        "actors.engine=vllm actors.vllm.max_block=8",
        "actors.vllm.max_block=8 is below the largest block of 16 that is decoded; raise it, or leave it at 0",
    ),
    (
        "actors.engine=vllm actors.vllm.max_tokens=999",
        "actors.vllm.max_tokens=999 is below the 1120 of data.max_prompt_tokens and rollout.max_new_tokens together",
    ),
    ("actors.labels=H100", "actors.labels='H100': input should be a valid dictionary"),
    # folders
    ("run.name=a/b", "run.name='a/b': use letters, digits, dot, dash and underscore only, at most 100"),
    ("run.resume=auto run.name=", "run.resume=auto needs run.name"),
    ("run.resume=P/nowhere", "run.resume=P/nowhere: no run folder (it has no config.yaml)"),
    ("run.dir=P run.name=held", "already holds a run; choose another run.name, or continue it with run.resume="),
    ("run.dir=P/a_file", "run.dir=P/a_file: cannot make P/a_file/"),
    # model
    ("model.path=gsm8k", "model.path=gsm8k: no such folder, and no hub name (OWNER/NAME); or use embedded"),
    ("model.path=P/nowhere", "model.path=P/nowhere: no readable config.json there"),
    ("model.path=P/nothing", "model.path=P/nothing: no readable config.json there"),
    ("model.path=P/gpt2", "model_type 'gpt2' is not served; known are qwen3, sdar, llama"),
    ("model.mask_token_id=99999", "model.mask_token_id=99999: the vocabulary of"),
    # data
    ("data.train=P/none.jsonl", "data.train=P/none.jsonl: no such file"),
    ("data.train=P/broken.jsonl", "data.train=P/broken.jsonl: line 2 is not JSON"),
    ("data.train=P/columns.jsonl", "row 0 has no 'question'; it has 'q', 'a'. Set data.question_field"),
    ("data.train=P/empty.jsonl", "data.train=P/empty.jsonl: holds no problem"),
    ("data.train=P/numbers.jsonl", "data.train=P/numbers.jsonl: line 1 is not a JSON object"),
    ("data.train=P/one.jsonl", "1 problems are too few to hold any out; give data.eval"),
    ("data.train=P/rows.csv", "data.train=P/rows.csv: give a .jsonl or .parquet file, or a hub name"),
    ("data.train=P/text.parquet", "data.train=P/text.parquet: not readable as Parquet"),
    ("data.max_prompt_tokens=2", "data.train: no problem is left; 8704 prompts exceed data.max_prompt_tokens=2"),
    ("learner.replay=P/none.parquet", "learner.replay=P/none.parquet: no such file"),
    ("learner.replay=P/text.parquet", "learner.replay=P/text.parquet: not readable as trajectories"),
    (
        "learner.replay=P/good.parquet run.resume=P/nowhere",
        "P/nowhere/checkpoints: no valid checkpoint of update 3 or before to resume from",
    ),
    ("learner.replay=P/good.parquet run.resume=auto run.name=", "run.resume=auto needs run.name"),
    # cluster
    ("cluster.address=127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
    ("cluster.address=nonsense", "cluster.address or RAY_ADDRESS is 'nonsense'; write HOST:PORT"),
]


@pytest.mark.parametrize(("given", "told"), MISTAKES, ids=[given for given, _ in MISTAKES])
def test_a_mistake_is_named_with_its_remedy(place, tmp_path, capsys, given, told):
    settings = [word.replace("P/", f"{place}/").replace("=P", f"={place}") for word in shlex.split(given)]
    defaults = {"run.dir": str(tmp_path), "run.name": "new"}
    settings += [f"{key}={value}" for key, value in defaults.items() if not any(s.startswith(key) for s in settings)]
    assert run.main(settings) == 2
    assert_named(place, capsys, told)


def test_kernels_without_triton_are_named_with_their_remedy(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    settings = ["actors.gpus=1", "actors.cuda_graphs=true", "actors.triton_kernels=true", "model.dtype=float32"]
    assert run.main([*settings, f"run.dir={tmp_path}", "run.name=new"]) == 2
    assert_named(place, capsys, "actors.triton_kernels=true: Triton is not installed")


OF_EVALUATIONS = [
    ("grid.tokens_per_step=[0]", "grid.tokens_per_step.0=0: input should be greater than or equal to 1"),
    ("grid.thresholds=[90]", "grid.thresholds.0=90: input should be less than or equal to 1"),
    ("grid.entropy_bounds=[0]", "grid.entropy_bounds.0=0: input should be greater than 0"),
    ("grid.blocks=[0]", "grid.blocks.0=0: input should be greater than or equal to 1"),
    ("grid.blocks=[128]", "grid.max_new_tokens=96 cannot hold a block of 128"),
    ('"data=[{source: arithmetic, prompt: hello}]"', "data.0.prompt='hello': needs the placeholder {question}"),
    (
        "actors.engine=vllm actors.vllm.max_block=4",
        "actors.vllm.max_block=4 is below the largest block of 16 that is decoded",
    ),
    ("model.path=P/run", "data.eval is empty, and only the run knows the part of train.jsonl it holds out"),
]


@pytest.mark.parametrize(("given", "told"), OF_EVALUATIONS, ids=[given for given, _ in OF_EVALUATIONS])
def test_a_mistake_in_an_evaluation_is_named_with_its_remedy(place, tmp_path, capsys, given, told):
    settings = [word.replace("P/", f"{place}/") for word in shlex.split(given)]
    assert evaluate.main([f"folder={tmp_path / 'new'}", *settings]) == 2
    assert_named(place, capsys, told)
    assert not any(tmp_path.iterdir())


def assert_named(place, capsys, told):
    message = capsys.readouterr().err.replace(str(place), "P")
    assert message.startswith("error: ")
    assert told in message
    assert "Traceback" not in message


def test_the_same_mistake_in_a_file_is_named_the_same_way(place, capsys):
    path = place / "settings.yaml"
    path.write_text(yaml.safe_dump({"rollout": {"problem": 3}}))
    assert run.main(["--config", str(path)]) == 2
    assert "rollout.problem: unknown setting; did you mean problems?" in capsys.readouterr().err
