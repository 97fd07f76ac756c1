"""Curves of accuracy over tokens per forward, against numbers worked out by hand."""

import json
import statistics

import pytest

from tstar_ray.config import ConfigError, load_config, load_settings
from tstar_ray.config_evaluate import held_out_set
from tstar_ray.config_experiment import ExperimentConfig
from tstar_ray.experiment_frontier import Decoded, fastest, frontier, frontier_markdown, frontier_rows, gain


def decoded(arm, seed, threshold, accuracy, tpf, block=16):
    return Decoded(arm, seed, block, threshold, accuracy, tpf, tpf * 0.75, 0.0)


MODELS = [
    decoded("tstar", 1, 0.9, 0.80, 3.0),
    decoded("tstar", 1, 0.5, 0.60, 4.0),
    decoded("tstar", 2, 0.9, 0.90, 3.0),
    decoded("tstar", 2, 0.5, 0.50, 5.0),
    decoded("tstar", 1, 0.9, 0.95, 2.0, block=4),
    decoded("direct", 1, 0.9, 0.70, 2.0),
    decoded("direct", 1, 0.5, 0.50, 4.0),
    decoded("direct", 2, 0.9, 0.90, 4.0),
    decoded("direct", 2, 0.5, 0.90, 6.0),
]
OWN = {"tstar": 0.95, "direct": 0.8}
REFERENCE = {"accuracy": 0.6, "tpf": 2.0, "tpf_with_commits": 1.5}


def test_rows_are_means_over_the_seeds_of_each_way_to_decode():
    found = {(r.arm, r.block, r.threshold): r for r in frontier_rows(MODELS)}
    assert list(found)[:3] == [("tstar", 4, 0.9), ("tstar", 16, 0.5), ("tstar", 16, 0.9)]
    row = found["tstar", 16, 0.5]
    assert (row.seeds, row.accuracy, row.accuracy_worst, row.tpf) == (2, pytest.approx(0.55), 0.5, 4.5)
    assert row.accuracy_sd == pytest.approx(statistics.stdev([0.6, 0.5]))
    assert row.tpf_with_commits == pytest.approx(4.5 * 0.75)
    assert found["tstar", 4, 0.9].accuracy_sd == 0


def test_the_fastest_is_the_most_parallel_that_keeps_the_accuracy_at_the_largest_block():
    rows = frontier_rows(MODELS)
    best = fastest(rows, "tstar", REFERENCE, own=0.95)
    assert best["threshold"] == 0.9, "0.55 at 0.5 is less than 97 % of 0.6"
    assert best["accuracy_kept"] == pytest.approx(0.85 / 0.6)
    assert best["worst_kept"] == pytest.approx(0.80 / 0.6)
    assert best["own_kept"] == pytest.approx(0.85 / 0.95)
    assert (best["tpf_multiple"], best["tpf_with_commits_multiple"]) == (1.5, 1.5)
    assert fastest(rows, "tstar", REFERENCE | {"accuracy": 0.55 / 0.971}, own=0.95)["threshold"] == 0.5
    assert fastest(rows, "tstar", REFERENCE | {"accuracy": 0.95}, own=0.95) is None


def test_curves_are_compared_at_equal_tpf_where_both_reach():
    found = gain(MODELS, "tstar", "direct", 16)
    # Seed 1, TPF 3 to 4: T* falls from .8 to .6, direct from .6 to .5. Seed 2, 4 to 5: T* from .7 to .5, direct .9.
    first, second = (0.8 + 0.6) / 2 - (0.6 + 0.5) / 2, (0.7 + 0.5) / 2 - 0.9
    assert found["mean_gain"] == pytest.approx((first + second) / 2)
    assert found["least_gain"] == pytest.approx(second)
    assert (found["wins"], found["pairs"]) == (1, 2)
    back = gain(MODELS, "direct", "tstar", 16)
    assert back["mean_gain"] == pytest.approx(-found["mean_gain"])
    assert gain(MODELS, "tstar", "nobody", 16) is None
    apart = [decoded("a", 1, 0.9, 0.8, 3.0), decoded("b", 1, 0.9, 0.8, 4.0)]
    assert gain(apart, "a", "b", 16) is None, "no TPF that both reach"


def test_everything_goes_through_json_and_is_told():
    found = json.loads(json.dumps(frontier(MODELS, REFERENCE, OWN)))
    text = frontier_markdown(found, {"tstar": "T*"})
    assert "| T* | 55.0%, 4.50 (3.38) | 85.0%, 3.00 (2.25) |" in text
    assert "T* at B=16 and 0.9: 141.7% of the reference's accuracy (worst seed 133.3%) at 1.50 times its TPF" in text
    assert "89.5% of the arm's own at its smallest block" in text
    assert "T* against direct at equal TPF: -7.5 points on the mean, -30.0 on the seed that gains least" in text
    hard = frontier_markdown(frontier(MODELS, REFERENCE | {"accuracy": 1.0}, OWN), {})
    assert "tstar: no decoding at B=16 keeps 97% of the accuracy" in hard


def test_the_held_out_problems_of_a_run_are_a_data_set():
    run = load_config(None, ["data.train=t.jsonl", "data.eval=e.jsonl", "data.prompt='{question}?'", "eval.problems=7"])
    found = held_out_set(run)
    assert (found.source, found.limit, found.template) == ("e.jsonl", 7, "{question}?")
    assert held_out_set(load_config(None, [])).source == "arithmetic"
    with pytest.raises(ConfigError, match=r"thresholds.0=90: input should be less than or equal to 1"):
        load_settings(ExperimentConfig, None, ["name=x", "arms={a: {}}", "thresholds=[90]"])
    boxed = held_out_set(load_config(None, ["data.train=t.jsonl", "data.eval=arithmetic"]))
    assert "boxed" in boxed.template, "the run asks its held-out problems as it asks those it trains on"
    with pytest.raises(ConfigError, match="data.eval is empty, and only the run knows the part of t.jsonl"):
        held_out_set(load_config(None, ["data.train=t.jsonl"]))
