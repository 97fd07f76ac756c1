"""Trackers write what their own readers find; samples show the reveal order."""

import builtins
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tstar_ray.config import Config, ConfigError, Stage
from tstar_ray.problems import Problem
from tstar_ray.reporter import Reporter
from tstar_ray.samples import reveal_text, sample_page
from tstar_ray.tracking import TensorBoard, open_trackers
from tstar_ray.trajectory import Group, Sample, Trajectory

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def trajectory(prompt, steps, *, completion, block):
    total = prompt + len(steps)
    return Trajectory(
        group_id=0,
        sample=0,
        token_ids=np.arange(total, dtype=np.int32),
        prompt_len=prompt,
        completion_len=completion,
        step_map=np.array(steps, dtype=np.int32),
        logprobs=np.zeros(len(steps), dtype=np.float32),
        block_size=block,
        temperature=0.0,
        weight_versions=np.zeros((total - prompt // block * block) // block, dtype=np.int64),
        stop_reason="stop",
    ).validate()


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


@pytest.mark.parametrize(
    ("prompt", "steps", "completion", "block", "expected"),
    [
        (4, [1, 2, 1, 3, 4, 4, 4, 4], 8, 4, "e¹f²g¹h³ │ i¹j¹k¹l¹"),  # steps count anew in every block
        (6, [2, 1, 3, 3, 4, 5], 6, 4, "g²h¹ │ i¹j¹k²l³"),  # the first block holds two prompt tokens
        (4, [1, 2, 1, 3, 5, 4, 6, 4], 6, 4, "e¹f²g¹h³ │ i²j¹"),  # what follows the stop token is not shown
        (4, [1, 1, 2, 2], 1, 4, "e¹"),
        (12, list(range(12, 0, -1)), 12, 12, "m¹²n¹¹o¹⁰p⁹q⁸r⁷s⁶t⁵u⁴v³w²x¹"),
    ],
)
def test_an_answer_shows_the_step_of_every_token(prompt, steps, completion, block, expected):
    assert reveal_text(trajectory(prompt, steps, completion=completion, block=block), decode) == expected


def group(number, question, verdict):
    sample = Sample(trajectory(4, [1, 2, 1, 3], completion=4, block=4), "", verdict, 0.0)
    return Group(number, Problem(str(number), question, "4*"), (sample,))


def test_a_page_of_samples_is_not_taken_for_markdown():
    page = sample_page([group(0, "2*3*4\nis?", "wrong"), group(1, "#1", "correct")], decode)
    first, second = page.split("\n\n---\n\n")
    assert first == "**2\\*3\\*4 is?**\n\nexpected 4\\*: wrong\n\ne¹f²g¹h³"
    assert second.startswith("**\\#1**")


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def figure():
    made = Figure()
    made.subplots().plot([1, 2], [3, 4])
    return made


def test_tensorboard_finds_numbers_text_and_figures_and_forgets_what_is_made_again(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard")
    for step in range(1, 5):
        board.numbers({"a/b": step}, step)
    board.text("samples/b4", "so **it** went", 2)
    board.figure("stage/curves", figure(), 3)
    board.rewind(2)
    board.numbers({"a/b": 30.0}, 3)
    board.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("a/b")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert found.Tensors("samples/b4/text_summary")[0].tensor_proto.string_val[0] == b"so **it** went"


def test_the_reporter_shows_settings_samples_and_figures(tmp_path):
    trackers = open_trackers(["tensorboard"], tmp_path, {})
    with Reporter(tmp_path, total=1, trackers=trackers) as reporter:
        reporter.settings("run:\n  seed: 1\n")
        reporter.samples(3, [group(0, "1+1", "correct")])  # no tokenizer yet: nothing to show
        reporter.decode = decode
        reporter.samples(4, [group(i, f"{i}+1", "correct") for i in range(9)])
        reporter.stage_ended(4, Stage(name="b4", rollout_block=4, train_block=4))  # no run here: said, and no more
    found = events(tmp_path)
    assert b"seed: 1" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    (page,) = found.Tensors("samples/b4/text_summary")
    assert page.step == 4
    text = page.tensor_proto.string_val[0].decode()
    assert "0\\+1" in text
    assert text.count("e¹f²g¹h³") == 4


def wandb_records(folder):
    """Records of an offline run: a LevelDB log, that is blocks of 32 KiB of (checksum, length, type) and data, where
    type 1 is a whole record, and 2, 3, 4 begin, continue and end one."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    log, at, data = path.read_bytes(), 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        data += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "my-run"
    folder.mkdir()
    (tracker,) = open_trackers(["wandb"], folder, Config().model_dump(mode="json"))
    tracker.numbers({"rollout/tpf": 2.5}, 7)
    tracker.text("samples/b4", "e¹f²", 7)
    tracker.figure("stage/curves", figure(), 7)
    tracker.rewind(6)
    tracker.close()
    records = list(wandb_records(folder))
    (run,) = [r.run for r in records if r.HasField("run")]
    assert run.display_name == "my-run"
    assert run.project == "tstar_ray"
    logged = [
        {item.key or "/".join(item.nested_key): item.value_json for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [row["rollout/tpf"] for row in logged if "rollout/tpf" in row] == ["2.5"]
    assert all(row["update"] == "7" for row in logged)
    assert any("samples/b4" in row for row in logged)
    assert any(key.startswith("stage/curves/") for row in logged for key in row)


def test_a_missing_tracker_is_named_with_its_remedy(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'"):
        open_trackers(["tensorboard", "wandb"], tmp_path, {})
