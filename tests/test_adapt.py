"""`python -m tstar_ray.adapt` as a user runs it: real checkpoints, data, Ray, DeepSpeed, signals."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from jobs import environment
from synthetic import make_checkpoint_folder

from tstar_ray.adapt_data import load_example_sets
from tstar_ray.config_adapt import AdaptConfig, AdaptDataConfig
from tstar_ray.model import load_checkpoint
from tstar_ray.model_files import inspect_checkpoint

QUESTIONS = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}."} for a in range(12) for b in range(6)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def autoregressive(folder, corpus, architecture="qwen3"):
    """A checkpoint as it comes from autoregressive training: no mask token anywhere."""
    make_checkpoint_folder(folder, corpus)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if t != "<|MASK|>"}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<|MASK|>"]
    renumbered = {t: i for i, t in enumerate(sorted(vocabulary, key=vocabulary.get))}
    state["model"]["vocab"] = renumbered
    for token in state["added_tokens"]:
        token["id"] = renumbered[token["content"]]
    from tokenizers import Tokenizer

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    fast.chat_template = tokenizer.chat_template
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "eos_token_id": fast.eos_token_id, "bos_token_id": None}
    if architecture == "qwen3":
        config = transformers.Qwen3Config(vocab_size=len(fast) + 12, head_dim=32, **sizes)
        model = transformers.Qwen3ForCausalLM(config)
    else:
        config = transformers.LlamaConfig(vocab_size=len(fast), tie_word_embeddings=True, **sizes)
        model = transformers.LlamaForCausalLM(config)
    for file in folder.iterdir():
        file.unlink()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder, model, fast


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_mask_token_is_added_and_the_rest_of_the_model_stays(tmp_path, corpus, architecture):
    folder, model, tokenizer = autoregressive(tmp_path / "ar", corpus, architecture)
    with pytest.raises(ValueError, match="no mask token"):
        load_checkpoint(folder)
    found = load_checkpoint(folder, new_mask_token="<|MASK|>")
    assert found.model.mask_id == len(tokenizer) == len(found.tokenizer) - 1
    rows = model.config.vocab_size
    grown = found.model.hf.config.vocab_size
    assert (grown == rows) if architecture == "qwen3" else (grown % 64 == 0 and grown > rows)
    old, new = model.get_input_embeddings().weight, found.model.hf.get_input_embeddings().weight
    trained = len(tokenizer)
    torch.testing.assert_close(new[:trained], old[:trained], rtol=0, atol=0)
    torch.testing.assert_close(new[trained], old[:trained].mean(0))
    assert torch.isfinite(found.model.hf.get_output_embeddings().weight).all()
    assert found.model.suppressed_V[trained:].all()
    found.save(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.model.mask_id == found.model.mask_id
    with torch.no_grad():
        row = torch.tensor([[1, 5, 9]])
        torch.testing.assert_close(again.model.hf.lm_head.weight[:trained], model.lm_head.weight[:trained])
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(plain(row).logits[..., :trained], model(row).logits[..., :trained])


def test_a_checkpoint_with_a_mask_token_keeps_it(tmp_path, corpus):
    folder = make_checkpoint_folder(tmp_path / "sdar", corpus, model_type="sdar")
    before, after = load_checkpoint(folder), load_checkpoint(folder, new_mask_token="<|other|>")
    assert before.model.mask_id == after.model.mask_id
    assert len(before.tokenizer) == len(after.tokenizer)


def test_answers_follow_the_chat_template_and_prompts_are_those_of_rollouts(tmp_path, corpus):
    from tstar_ray.data import encode_prompt

    folder, _, _ = autoregressive(tmp_path / "ar", corpus)
    tokenizer, stop_ids = inspect_checkpoint(folder, new_mask_token="<|MASK|>")
    data = AdaptDataConfig(train=str(corpus), held_out=10, prompt="Q: {question}")
    stop = (*stop_ids, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    sets = load_example_sets(data, tokenizer, stop, largest_block=4)
    assert (len(sets.train), len(sets.held_out), sets.left_out) == (62, 10, 0)
    example, row = sets.train[3], QUESTIONS[3]
    prompt = encode_prompt(tokenizer, data.prompt, row["question"])
    assert tuple(example.ids[: example.prompt_len]) == prompt
    assert tokenizer.decode(example.ids[example.prompt_len :]) == f"{row['answer']}<|im_end|>"
    plain = load_example_sets(data, tokenizer, stop_ids, largest_block=4).train[3]
    assert tokenizer.decode(plain.ids).endswith("<|im_end|>\n<|endoftext|>"), "the template's end is no stop token here"


def test_a_model_adapted_by_default_is_asked_as_in_a_run_and_answers_as_the_verifier_reads(tmp_path):
    """Rows as GSM8K has them, and with a box already, through the defaults of both commands."""
    from reward.grading import Verdict, grade
    from tstar_ray.config import DataConfig
    from tstar_ray.data import load_problem_sets

    path = tmp_path / "data.jsonl"
    marked = [{"question": f"{n} + 1?", "answer": f"It is {n}+1={n + 1}.\n#### {n + 1},000"} for n in range(20)]
    boxed = [
        {"question": f"{n}?", "solution": f"#### Then\nit is \\boxed{{{n}}}.", "answer": str(n)} for n in range(20)
    ]
    for rows, settings in ((marked, {}), (boxed, {"solution_field": "solution"})):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder, _, _ = autoregressive(tmp_path / "ar", path)
        tokenizer, stop_ids = inspect_checkpoint(folder, new_mask_token="<|MASK|>")
        examples = load_example_sets(
            AdaptDataConfig(train=str(path), held_out=4, **settings), tokenizer, stop_ids, largest_block=4
        ).train
        problems = load_problem_sets(DataConfig(train=str(path)), tokenizer, held_out=4).train
        assert len(examples) == len(problems) == 16
        for example, asked in zip(examples, problems):
            assert tuple(example.ids[: example.prompt_len]) == asked.prompt_ids
            answer = tokenizer.decode(example.ids[example.prompt_len :])
            assert grade(answer, asked.problem.answer) is Verdict.correct, answer
    as_it_stands = AdaptDataConfig(train=str(path), held_out=4, answer_after="", prompt="{question}")
    path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    example = load_example_sets(as_it_stands, tokenizer, stop_ids, largest_block=4).train[0]
    assert "It is 0+1=1.\n#### 1,000" in tokenizer.decode(example.ids)


def test_plain_text_is_cut_into_whole_blocks(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "some words here " * n}) + "\n" for n in (3, 40, 60)))
    folder, _, _ = autoregressive(tmp_path / "ar", path)
    tokenizer, stop_ids = inspect_checkpoint(folder, new_mask_token="<|MASK|>")
    data = AdaptDataConfig(train=str(path), text_field="text", max_tokens=50, held_out=0)
    found = load_example_sets(data, tokenizer, stop_ids, largest_block=16).train
    assert all(e.prompt_len == 0 for e in found)
    assert {len(e.ids) for e in found[:-1] if len(e.ids) > 40} == {48}
    whole = [t for e in found for t in e.ids.tolist()]
    assert whole.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode([t for t in whole if t != tokenizer.eos_token_id]) == "some words here " * 103


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "data.train is empty"),
        ({"train": "/nowhere.jsonl"}, "no such file"),
        ({"question_field": "ask"}, "row 0 has no 'ask'"),
        ({"max_tokens": 8}, "no sample is left"),
    ],
)
def test_mistakes_in_the_data_are_named(tmp_path, corpus, change, message):
    from tstar_ray.config import ConfigError

    folder, _, _ = autoregressive(tmp_path / "ar", corpus)
    tokenizer, stop_ids = inspect_checkpoint(folder, new_mask_token="<|MASK|>")
    with pytest.raises(ConfigError, match=message):
        load_example_sets(AdaptDataConfig(**{"train": str(corpus)} | change), tokenizer, stop_ids, largest_block=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "give at least one"),
        ({"stages": [{"steps": 3, "epochs": 1}]}, "either steps or epochs"),
        ({"stages": [{"steps": 3, "mixture": {0: 1}}]}, "positive block sizes"),
        ({"data": {"max_tokens": 8}, "stages": [{"steps": 3, "mixture": {16: 1}}]}, "exceeds data.max_tokens=8"),
        ({"noise": {"low": 0.5, "high": 0.2}}, "exceeds noise.high"),
        ({"model": {"dtype": "bfloat16"}}, "float32 on CPU"),
        ({"run": {"save_traces": True}}, "Extra inputs"),
        ({"run": {"report": True}}, "Extra inputs"),
    ],
)
def test_mistakes_in_the_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptConfig.model_validate(settings)


def test_importing_the_settings_loads_nothing_heavy():
    code = (
        "import sys, tstar_ray.config_adapt; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def command(tmp_path, *settings):
    return [sys.executable, "-m", "tstar_ray.adapt", f"run.dir={tmp_path}", f"model.path={tmp_path / 'ar'}", *settings]


def adapt(tmp_path, *settings, expect=0):
    job = subprocess.run(
        command(tmp_path, *settings), capture_output=True, text=True, timeout=240, env=environment(), cwd=tmp_path
    )
    assert job.returncode == expect, job.stdout + job.stderr
    return job.stdout + job.stderr


def settings_of(corpus):
    return [
        f"data.train={corpus}",
        "data.held_out=8",
        "data.prompt='{question}'",
        "train.batch=8",
        "train.lr=2e-3",
        "train.ranks=2",
        "train.row_tokens=128",
        "stages=[{steps: 12, mixture: {4: 1}}, {steps: 12, mixture: {4: 0.5, 8: 0.5}}]",
        "run.checkpoint_every=5",
        "run.log_every=4",
        "eval_every=10",
    ]


@pytest.mark.cluster
def test_an_adaptation_is_stopped_resumed_and_used_as_a_policy(tmp_path, corpus):
    """Two ranks; SIGTERM in the middle; the same command ends with the bits of a run that was never stopped."""
    autoregressive(tmp_path / "ar", corpus)
    settings = settings_of(corpus)
    straight = adapt(tmp_path, *settings, "run.name=straight")
    assert "held-out loss" in straight
    job = subprocess.Popen(
        command(tmp_path, *settings, "run.name=job", "run.resume=auto"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.startswith("step 8/24"):
            job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 130, "".join(lines)
    assert any("then saving" in line for line in lines)
    output = adapt(tmp_path, *settings, "run.name=job", "run.resume=auto")
    assert "resumed" in output
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "job")]
    assert results[0] == results[1]
    assert results[0]["loss_after"]["4"] < results[0]["loss_before"]["4"]
    a, b = (load_checkpoint(tmp_path / name / "final") for name in ("straight", "job"))
    for name, parameter in a.model.named_parameters():
        np.testing.assert_array_equal(
            parameter.detach().numpy(), dict(b.model.named_parameters())[name].detach().numpy()
        )
    rows = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows if r["kind"] == "step"] == list(range(1, 25))
    assert {r["train/block_size"] for r in rows if r["kind"] == "step" and r["update"] <= 12} == {4}
    assert {r["train/block_size"] for r in rows if r["kind"] == "step" and r["update"] > 12} == {4, 8}
    assert "ended already" in adapt(tmp_path, *settings, "run.name=job", "run.resume=auto")

    from actors.torch_engine import TorchEngine
    from tstar_ray.decoding import Decoding
    from tstar_ray.trajectory import Request

    prompt = tuple(a.tokenizer("What is 3 + 4?")["input_ids"])
    decoding = Decoding(block_size=8, max_new_tokens=24, stop_ids=a.stop_ids)
    (trajectory,) = TorchEngine(a.model).generate([Request(0, 0, prompt, seed=1)], decoding)
    assert a.model.mask_id not in trajectory.token_ids


@pytest.mark.cluster
def test_a_silent_rank_ends_it_in_time_and_it_goes_on_with_the_same_samples_only(tmp_path, corpus):
    autoregressive(tmp_path / "ar", corpus)
    settings = [*settings_of(corpus), "run.name=job", "run.resume=auto", "train.silent_s=6"]
    job = subprocess.Popen(
        command(tmp_path, *settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        cwd=tmp_path,
    )  # fmt: skip
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.startswith("step 8/24"):
            ranks = json.loads((tmp_path / "job" / "status.json").read_text())["learner"]["actors"]
            os.kill(ranks["learner-1"]["pid"], signal.SIGSTOP)
    assert job.wait(timeout=60) == 2, "".join(lines)
    assert "rank 1 gave no sign of life" in "".join(lines)
    assert any((tmp_path / "job" / "logs").glob("*/raylet.out")), "what the private cluster printed is kept"
    scale = [sys.executable, "-m", "cluster.scale", str(tmp_path / "job")]
    told = subprocess.run(scale, capture_output=True, text=True, timeout=60, check=True, env=environment())
    assert "learner-1 on" in told.stdout
    output = adapt(tmp_path, *settings, "train.batch=4", expect=2)
    assert "was made with train.batch=8, this command has 4" in output


def test_gpus_are_waited_for_where_nodes_may_join():
    from cluster.session import ClusterError
    from tstar_ray.adapt import _place

    def place(**cluster):
        settings = {"train": {"gpus": 1, "ranks": 4, "cpus": 3}, "cluster": cluster}
        return _place(AdaptConfig.model_validate(settings), {"CPU": 2.0})[0]

    with pytest.raises(ClusterError, match="4 GPUs asked.*or set cluster.autoscaling=true"):
        place()
    assert place(autoscaling=True) == {"num_cpus": 3, "num_gpus": 1}


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.path="], "model.path is empty"),
        (["model.path=/nowhere"], "no readable config.json"),
        (["train.gpus=1"], "1 GPUs asked"),
        (["train.lrr=1"], "did you mean lr?"),
    ],
)
def test_a_failing_start_is_a_clear_message(tmp_path, corpus, settings, message):
    autoregressive(tmp_path / "ar", corpus)
    output = adapt(tmp_path, f"data.train={corpus}", "run.name=job", *settings, expect=2)
    assert message in output
    assert "Traceback" not in output


@pytest.mark.cluster
def test_the_script_of_the_embedded_model_adapts_with_this_command(tmp_path):
    """A few steps of everything: pre-training, adaptation, evaluation."""
    command = [sys.executable, "-m", "tstar_ray.embedded.make", "--out", str(tmp_path / "made"), "--problems", "300"]
    command += ["--ar-steps", "3", "--sft-steps", "4", "--batch", "8", "--held-out", "4", "--threads", "1"]
    job = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), cwd=tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("accuracy") == 6
    made = load_checkpoint(tmp_path / "made")
    assert made.model.hf.config.block_size == 4
    assert made.stop_ids == load_checkpoint("embedded").stop_ids
