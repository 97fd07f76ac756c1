"""Analysis of a run folder and an evaluation folder made by hand, whose answers are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_trajectory

from tstar_ray import analyze
from tstar_ray.collection import Collection
from tstar_ray.config import ConfigError, load_config, load_settings
from tstar_ray.config_evaluate import EvaluateConfig
from tstar_ray.decoding import Decoding
from tstar_ray.grid import Cell, Store, score, write_results
from tstar_ray.problems import Problem
from tstar_ray.report.stage import stage_figures
from tstar_ray.run_folder import read_run
from tstar_ray.schedule import measure, view
from tstar_ray.traces import write_traces
from tstar_ray.trajectory import Group, Sample, Trajectory


def trajectory(steps, *, block_size=4, prompt=4, group_id=0):
    """All of ``steps`` is answer; the prompt is one block."""
    blocks = len(steps) // block_size
    return Trajectory(
        group_id=group_id,
        sample=0,
        token_ids=np.arange(prompt + len(steps), dtype=np.int32) % 60,
        prompt_len=prompt,
        completion_len=len(steps),
        step_map=np.array(steps, dtype=np.int32),
        logprobs=np.full(len(steps), -0.5, dtype=np.float32),
        block_size=block_size,
        temperature=1.0,
        weight_versions=np.zeros(blocks, dtype=np.int64),
        stop_reason="length",
    ).validate()


def groups(*trajectories, verdict="correct"):
    return [
        Group(i, Problem(f"p{i}", f"question {i}", "1"), (Sample(replace(t, group_id=i), "text", verdict, 1.0),))
        for i, t in enumerate(trajectories)
    ]


LEFT_TO_RIGHT, BACKWARDS = [1, 2, 3, 4], [4, 3, 2, 1]


@pytest.fixture
def run_folder(tmp_path):
    """Four updates at B=4: the first half left to right, the second backwards; then one at B=8 without traces."""
    config = load_config(None, ["curriculum.blocks=[4,8]", "curriculum.updates=[4,1]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    records = []
    for update in range(1, 6):
        stage = "b4" if update < 5 else "b8"
        records.append({"kind": "update", "update": update, "stage": stage, "rollout/accuracy": update / 10})
        if update < 5:
            steps = LEFT_TO_RIGHT if update < 3 else BACKWARDS
            write_traces(tmp_path / "traces" / f"update-{update:05d}.parquet", groups(trajectory(steps)))
    records.append({"kind": "evaluation", "update": 5, "eval_b8/accuracy": 0.5, "eval_b8/tpf": 2.0})
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "update", "upd')
    return tmp_path


def test_a_run_is_read_even_while_it_is_written(run_folder):
    run = read_run(run_folder)
    assert [(s.stage.name, s.updates) for s in run.stages] == [("b4", (1, 2, 3, 4)), ("b8", (5,))]
    assert run.series("rollout/accuracy", run.stages[0]) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    assert run.evaluations == ({"update": 5, "during": False, "block_size": 8, "accuracy": 0.5, "tpf": 2.0},)
    assert run.result is None
    assert run.traces(5) is None
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(run_folder / "traces")


def test_stages_are_measured_at_both_ends(run_folder):
    (stage,) = analyze.analyze_run(read_run(run_folder))
    assert (stage.name, stage.block_size, stage.updates) == ("b4", 4, (1, 2, 3, 4))
    assert (stage.start.nonmono_rate, stage.end.nonmono_rate) == (0, 0.75)
    assert (stage.start.kendall_tau, stage.end.kendall_tau) == (1, -1)
    assert (stage.start.js_stage_start, stage.end.js_stage_start) == (None, 1)
    assert [s.js_stage_start for s in stage.by_update] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("variants", "nonmono", "told"),
    [
        ("[{threshold: 0.6}, {}, {sub_block: 4}]", 0.75, "samples: variant 1 of 3, decoded as the stage says"),
        ("[{sub_block: 4}, {threshold: 0.6}]", 0.75, "samples: variant 1 of 2, decoded at threshold 0.6: none is"),
        ("[{sub_block: 4}, {sub_block: 2}]", 0, "samples: variant 0 of 2, decoded in sub-blocks of 4: none is"),
        ("[{}, {sub_block: 8}]", 0.375, ""),
    ],
)
def test_only_samples_that_decode_alike_are_measured_together(tmp_path, capsys, variants, nonmono, told):
    """At B=8: samples 0, 2 and 4 of a group left to right, 1, 3 and 5 backwards in both halves."""
    config = load_config(None, ["curriculum.blocks=[8]", "curriculum.updates=[1]", f"rollout.variants={variants}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    record = {"kind": "update", "update": 1, "stage": "b8", "rollout/accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    forward, backward = [1, 2, 3, 4, 5, 6, 7, 8], [4, 3, 2, 1, 8, 7, 6, 5]
    made = [trajectory(backward if i % 2 else forward, block_size=8, prompt=8) for i in range(6)]
    if "{}, {sub_block: 4}" in variants:  # three variants: sample 1 and 4 are as the stage says
        made[4] = made[1]
    samples = tuple(Sample(replace(t, sample=i), "", "correct", 1.0) for i, t in enumerate(made))
    write_traces(tmp_path / "traces" / "update-00001.parquet", [Group(0, Problem("p", "q", "1"), samples)])
    (stage,) = analyze.analyze_run(read_run(tmp_path))
    assert (stage.start.nonmono_rate, stage.by_update[0].nonmono_rate) == (nonmono, nonmono)
    assert analyze.measured_samples([stage]).startswith(told)
    assert analyze.main([str(tmp_path)]) == 0
    assert told.partition(":")[0] in capsys.readouterr().out
    assert json.loads((tmp_path / "analysis.json").read_text())["stages"][0]["samples"] == str(stage.alike or "all")
    figures = stage_figures(tmp_path, "b8")
    assert figures["reveals"].get_suptitle().startswith(told)


def test_columns_read_alone_equal_whole_trajectories(tmp_path):
    rng = np.random.default_rng(0)
    made = [make_trajectory(rng, prompt_len=int(rng.integers(1, 9)), blocks=3, block_size=8) for _ in range(20)]
    for name, part in (("a", made[:12]), ("b", made[12:])):
        write_traces(tmp_path / f"{name}.parquet", groups(*part))
    found = analyze.read_reveals([tmp_path / "a.parquet", tmp_path / "b.parquet"], 8)
    expected = view([t.step_map for t in made], [t.prompt_len for t in made], [t.completion_len for t in made], 8)
    assert measure(found) == measure(expected)


def test_the_command_prints_a_row_for_each_end_and_writes_json(run_folder, capsys):
    assert analyze.main([str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "b4 1-2" in printed
    assert "b4 3-4" in printed
    document = json.loads((run_folder / "analysis.json").read_text())
    assert document["stages"][0]["end"]["anchor_rate"] == 1
    assert np.sum(document["stages"][0]["start"]["heat_map"]) == pytest.approx(1)


def test_what_is_missing_is_said(tmp_path, capsys):
    assert analyze.main([str(tmp_path)]) == 2
    assert "no evaluation was finished there" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(load_config().to_yaml())
    (tmp_path / "metrics.jsonl").write_text("")
    assert analyze.main([str(tmp_path)]) == 2
    assert "run.save_traces=true" in capsys.readouterr().err


def test_forced_orders_are_compared_in_pairs(tmp_path, capsys):
    """Right on 1 1 0 1 learned, on 1 0 0 0 forced: differences 0 -1 0 -1, mean -1/2, s.e. sqrt(1/3 / 4)."""
    config = load_settings(EvaluateConfig, None, [f"folder={tmp_path}"])
    store, results = Store(tmp_path, save_traces=True), []
    for order, right, steps in (
        ("learned", [1, 1, 0, 1], BACKWARDS),
        ("left_to_right", [1, 0, 0, 0], LEFT_TO_RIGHT),
    ):
        cell = Cell("made", Decoding(block_size=4, max_new_tokens=8, stop_ids=(), order=order), 1)
        collected = [groups(trajectory(steps), verdict="correct" if r else "wrong")[0] for r in right]
        collected = [replace(g, group_id=i) for i, g in enumerate(collected)]
        collection = Collection(groups=collected, rollout_s=1.0)
        results.append(score(order, cell, collection, model="m", checksum="c", problems=4))
        store.put(results[-1], collection)
    write_results(tmp_path, config, results)
    (effect,) = analyze.order_effects(results)
    assert (effect.order, effect.accuracy, effect.tpf) == ("left_to_right", -0.5, 0)
    assert effect.error == pytest.approx((1 / 3 / 4) ** 0.5)
    # Each misses another problem: 0 and 2 are left, with differences 0 and 0.
    missing = [
        replace(r, problems=3, unscored=1, scored=scored, correct=tuple(r.correct[i] for i in scored))
        for r, scored in zip(results, ((0, 2, 3), (0, 1, 2)))
    ]
    assert [(e.accuracy, e.error) for e in analyze.order_effects(missing)] == [(0, 0)]
    assert analyze.main([str(tmp_path)]) == 0
    assert "-50.0 points" in capsys.readouterr().out
    document = json.loads((tmp_path / "analysis.json").read_text())
    assert [c["schedule"]["nonmono_rate"] for c in document["cells"]] == [0.75, 0]
