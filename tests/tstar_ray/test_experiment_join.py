"""Runs of an experiment that ended on another machine."""

import json
from pathlib import Path

import pytest

from tstar_ray.config_base import ConfigError
from tstar_ray.config_experiment import ExperimentConfig
from tstar_ray.experiment_join import join

CONFIG = {
    "name": "a",
    "seeds": [1, 2],
    "settings": ["rollout.problems=4"],
    "arms": {"base": {"decode_only": True}, "direct": {"settings": ["curriculum.mode=direct"]}},
}
SCORES = {"accuracy": 0.5, "tpf": 2.0, "tpf_with_commits": 1.5, "truncated": 0.0}


def result(seeds, **changes):
    evaluation = SCORES | {"decoding": {"block_size": 16}}
    return {
        "experiment": CONFIG | {"name": "elsewhere", "seeds": seeds} | changes,
        "cells": [{"arm": "direct", "seed": seed, "evaluations": [evaluation], "updates": 4} for seed in seeds],
        "decoded": [{"arm": "direct", "seed": seed, "block": 16, "threshold": 0.9, **SCORES} for seed in seeds],
    }


def joined(tmp_path, *results, here=(("direct", 1), ("direct", 2))):
    files = [tmp_path / f"{number}.json" for number in range(len(results))]
    for file, one in zip(files, results):
        file.write_text(json.dumps(one))
    return join(ExperimentConfig(**CONFIG), files, here)


def test_other_seeds_come_with_all_they_have(tmp_path):
    cells, decoded = joined(tmp_path, result([3, 4]), result([5]))
    assert [(cell.arm, cell.seed, cell.updates) for cell in cells] == [("direct", seed, 4) for seed in (3, 4, 5)]
    assert [(one.seed, one.threshold, one.tpf) for one in decoded] == [(seed, 0.9, 2.0) for seed in (3, 4, 5)]
    assert cells[0].evaluations == [SCORES | {"decoding": {"block_size": 16}}]


def test_seeds_asked_for_here_that_have_not_ended_may_come_from_there(tmp_path):
    cells, _ = joined(tmp_path, result([1, 2]), here=[])
    assert [cell.seed for cell in cells] == [1, 2]


def test_the_start_model_may_be_here_and_there(tmp_path):
    there = result([1])
    there["cells"] = [{"arm": "base", "seed": 1, "evaluations": []}]
    cells, _ = joined(tmp_path, there, there, here=[("base", 1), ("direct", 1)])
    assert {(cell.arm, cell.seed) for cell in cells} == {("base", 1)}


def test_nothing_to_join():
    assert join(ExperimentConfig(**CONFIG), [], []) == ([], [])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([result([2, 3])], r"0\.json: direct-s2 ended here or in a file before; every run counts once"),
        ([result([3, 4]), result([3, 4])], r"1\.json: direct-s3, direct-s4 ended here"),
        ([result([3], settings=["rollout.problems=5"])], "arm direct had other settings: .*problems=5.*problems=4"),
        ([result([3], thresholds=[0.5])], r"'thresholds': \[0\.5\]"),
        ([{"experiment": CONFIG}], r"0\.json: not the experiment.json of an experiment \(KeyError\('cells'\)\)"),
        ([[1]], "not the experiment.json"),
        ([result([3]) | {"cells": [{"arm": "tstar", "seed": 3, "evaluations": []}]}], "its arm tstar is none of this"),
        ([result([3], arms={"tstar": {}})], "holds runs of direct without the settings of that arm"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path, results, message):
    with pytest.raises(ConfigError, match=message):
        joined(tmp_path, *results)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match="--join /nowhere.json: .*No such file"):
        join(ExperimentConfig(**CONFIG), [Path("/nowhere.json")], [])
