"""Tables of an experiment against numbers worked out by hand, and figures that can be opened."""

import json
import statistics

import pytest

from tstar_ray.budget import KEYS, read_budget, read_curve
from tstar_ray.config import ConfigError, load_config
from tstar_ray.config_experiment import ExperimentConfig
from tstar_ray.experiment import _decodings, plan
from tstar_ray.experiment_figures import draw
from tstar_ray.experiment_summary import CellResult, at_equal_tokens, budgets, compare, kept, markdown, rows, summary
from tstar_ray.settings import load_settings


def evaluation(block, accuracy, tpf):
    values = {"accuracy": accuracy, "tpf": tpf, "tpf_with_commits": tpf / 2, "truncated": 0.1}
    return {"decoding": {"block_size": block}, **values}


def point(update, block, accuracy, tokens, during=True):
    return {
        "update": update,
        "block": block,
        "accuracy": accuracy,
        "tpf": 2.0,
        "samples": update * 8,
        "learner_tokens": tokens,
        "during": during,
    }


def cell(arm, seed, small, large, tokens, curve=()):
    spent = dict.fromkeys(KEYS, 0.0) | {"learner_tokens": tokens, "samples": 80.0}
    return CellResult(arm, seed, [evaluation(4, *small), evaluation(16, *large)], spent, list(curve), updates=10)


def curve(accuracies, tokens, end, total):
    """Evaluations during training at B=16, and the tables at the ends, on other problems."""
    during = [point(2 + 2 * i, 16, a, t) for i, (a, t) in enumerate(zip(accuracies, tokens))]
    return [point(0, 16, 0.3, 0, during=False), *during, point(10, 16, end, total, during=False)]


CELLS = [
    CellResult("base", 1, [evaluation(4, 0.60, 2.0), evaluation(16, 0.30, 3.0)]),
    CellResult("base", 2, [evaluation(4, 0.60, 2.0), evaluation(16, 0.30, 3.0)]),
    cell("tstar", 1, (0.8, 2.2), (0.70, 4.0), 1000, curve([0.5, 0.6], [400, 800], 0.70, 1000)),
    cell("tstar", 2, (0.8, 2.2), (0.60, 5.0), 1000, curve([0.4, 0.5], [400, 800], 0.60, 1000)),
    cell("direct", 1, (0.7, 2.0), (0.72, 3.0), 1600, curve([0.5, 0.6, 0.7], [0, 700, 1200], 0.72, 1600)),
    cell("direct", 2, (0.7, 2.0), (0.40, 3.0), 1600, curve([0.2, 0.3, 0.5], [0, 700, 1200], 0.40, 1600)),
]


def test_rows_are_means_deviations_and_worst_seeds():
    found = {(r.arm, r.block): r for r in rows(CELLS)}
    tstar = found["tstar", 16]
    assert (tstar.accuracy, tstar.accuracy_worst, tstar.tpf) == pytest.approx((0.65, 0.60, 4.5))
    assert tstar.accuracy_sd == pytest.approx(statistics.stdev([0.7, 0.6]))
    assert tstar.tpf_with_commits == pytest.approx(2.25)
    assert found["base", 4].accuracy_sd == 0
    assert next(iter(found)) == ("base", 4)


def test_an_arm_is_measured_against_the_reference_at_its_smallest_block():
    found = kept(rows(CELLS), "tstar", "base")
    assert found["accuracy_kept"] == pytest.approx(0.65 / 0.60)
    assert found["worst_kept"] == pytest.approx(1.0)
    assert (found["own_block"], found["own_kept"]) == (4, pytest.approx(0.65 / 0.8))
    assert found["tpf_multiple"] == pytest.approx(2.25)
    assert kept(rows(CELLS), "tstar", "nobody") is None


def test_a_comparison_pairs_seeds_and_holds_learner_tokens_equal():
    found = compare(CELLS, "tstar", "direct", 16)
    assert (found.mean_gain, found.worst_gain) == pytest.approx((0.65 - 0.56, 0.60 - 0.40))
    assert (found.wins, found.pairs) == (1, 2)
    # Both were evaluated on the way at 800 tokens at most: T* to .6 and .5, direct between .6 and .7, .3 and .5.
    at_800 = (0.6 + 0.1 / 5, 0.3 + 0.2 / 5)
    assert found.equal_tokens == 800
    assert found.equal_tokens_gain == pytest.approx(((0.6 - at_800[0]) + (0.5 - at_800[1])) / 2)
    assert compare(CELLS, "direct", "tstar", 16).equal_tokens_gain == pytest.approx(-found.equal_tokens_gain)
    assert compare(CELLS[2:5], "tstar", "direct", 16).pairs == 1
    assert compare(CELLS, "tstar", "nobody", 16) is None
    assert compare(CELLS, "tstar", "base", 16).equal_tokens_gain is None, "the start model spent nothing"


def test_equal_tokens_need_evaluations_on_the_way_that_overlap():
    early, late = curve([0.5, 0.6], [100, 200], 0.9, 900), curve([0.4, 0.5], [300, 400], 0.9, 900)
    assert at_equal_tokens(early, late, 16) is None, "one ends before the other begins, the end tables apart"
    assert at_equal_tokens(early, early, 4) is None, "never evaluated at that block"
    assert at_equal_tokens(early, curve([0.2, 0.4], [150, 250], 0.9, 900), 16) == pytest.approx((200, 0.6, 0.3))


def test_budgets_are_means_of_those_that_spent_something():
    assert set(budgets(CELLS)) == {"tstar", "direct"}
    assert budgets(CELLS)["direct"]["learner_tokens"] == 1600
    assert budgets(CELLS)["direct"]["updates"] == 10


def test_the_table_names_every_arm_and_figures_open(tmp_path):
    found = summary(CELLS, "base")
    text = markdown(json.loads(json.dumps(found)), {"tstar": "T*"})
    assert "| T* | 16 | 65.0% ± 7.1% | 60.0% | 4.50 ± 0.71 | 2.25 | 10.0% | 2 |" in text
    told = "108.3% of the reference's accuracy at B=4 (worst seed 100.0%), 2.25 times its TPF; 81.2% of its own at B=4"
    assert f"T* at B=16: {told}" in text
    assert "T* against direct at B=16: +9.0 points on the mean, +20.0 on the worst seed, better on 1 of 2" in text
    paths = draw(tmp_path, found, CELLS, {})
    assert sorted(p.name for p in paths) == ["curves.png", "curves.svg", "pareto.png", "pareto.svg"]
    assert all(p.stat().st_size > 5000 for p in paths)
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (tmp_path / "pareto.svg").read_text()


def test_budget_and_curve_are_read_from_a_runs_metrics(tmp_path):
    def update(n, tokens):
        verdicts = {"verdict/correct": 5, "verdict/wrong": 3}
        more = {"rollout/mean_tokens": 10.0, "seconds/train": 1.0, "seconds/rollout": 2.0}
        return (
            {"kind": "update", "update": n, "learner/samples": 6, "learner/forwarded_tokens": tokens} | verdicts | more
        )

    def evaluated(n, block, accuracy):
        return {"kind": "evaluation", "update": n, f"eval_b{block}/accuracy": accuracy, f"eval_b{block}/tpf": 2.0}

    file = tmp_path / "metrics.jsonl"
    # Before the record of its update: during training. Behind it: of a table.
    records = [evaluated(0, 4, 0.5), update(1, 100), evaluated(2, 8, 0.6), update(2, 200), evaluated(2, 4, 0.7)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "upd')
    budget = read_budget(file)
    assert (budget["samples"], budget["trained_samples"], budget["learner_tokens"]) == (16, 12, 300)
    assert (budget["completion_tokens"], budget["train_seconds"], budget["rollout_seconds"]) == (160, 2, 4)
    told = ("update", "block", "accuracy", "learner_tokens", "during")
    assert [tuple(p[name] for name in told) for p in read_curve(file)] == [
        (0, 4, 0.5, 0, False),
        (2, 8, 0.6, 300, True),
        (2, 4, 0.7, 300, False),
    ]


ARMS = {"base": {"decode_only": True}, "a": {"settings": ["curriculum.mode=direct"]}, "b": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "at least one"),
        ({"arms": {"base": {"decode_only": True}}}, "at least one arm must train"),
        ({"arms": {"base": {"decode_only": True, "settings": ["run.seed=1"]}}}, "takes no settings"),
        ({"name": "../up"}, "letters, digits"),
        ({"reference": "c"}, "choose one of base, a, b"),
        ({"arms": {"a": {"label": "b"}, "b": {}}}, "arms: b, b share a label"),
        ({"arms": {"a": {"setings": []}}}, "did you mean settings?"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, change, message):
    file = tmp_path / "e.yaml"
    file.write_text(json.dumps({"name": "x", "arms": ARMS} | change))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_settings(ExperimentConfig, file)


def test_every_arm_that_trains_gets_every_seed_and_its_settings(tmp_path):
    config = ExperimentConfig.model_validate(
        {"name": "x", "dir": tmp_path, "arms": ARMS, "seeds": [3, 4], "settings": ["rollout.problems=7"]}
    )
    cells = plan(config, tmp_path, tmp_path / "x")
    assert [(c.name, c.config.run.seed, c.config.curriculum.mode) for c in cells] == [
        ("a-s3", 3, "direct"),
        ("b-s3", 3, "tstar"),
        ("a-s4", 4, "direct"),
        ("b-s4", 4, "tstar"),
    ]
    assert {c.config.rollout.problems for c in cells} == {7}
    sampled = load_config(None, ["rollout.confidence=sampled", "eval.blocks=[4]"])
    given = _decodings(config, sampled, "base", (3,), tmp_path, None).settings.grid
    assert (given.confidence, given.strategies, given.blocks) == ("sampled", ("dynamic",), (4,))
    static = {"settings": ("curriculum.strategy=static",), "thresholds": (0.5,)}
    with pytest.raises(ConfigError, match="mean something to dynamic unmasking only, and curriculum.strategy=static"):
        plan(config.model_copy(update=static), tmp_path, tmp_path / "x")
    bad = config.model_copy(update={"settings": ("rollout.problms=7",)})
    with pytest.raises(ConfigError, match="arms.a: rollout.problms: unknown setting"):
        plan(bad, tmp_path, tmp_path / "x")
