"""Evaluation: summaries by hand, its two limits against plain transformers, what is kept and what is not."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from reference import plain_twin
from synthetic import MASK_ID, make_model, make_trajectory

from actors.torch_engine import TorchEngine
from tstar_ray.collection import Collection, sample_seed
from tstar_ray.config import ConfigError, load_config, load_settings
from tstar_ray.config_evaluate import DataSet, EvaluateConfig
from tstar_ray.data import PromptedProblem
from tstar_ray.decoding import Decoding
from tstar_ray.evaluate import summarise
from tstar_ray.grid import Cell, Store, cell_key, curves, grid_cells, read_results, run_cells, score, write_results
from tstar_ray.problems import Problem
from tstar_ray.scores import aup, wilson_interval
from tstar_ray.traces import read_traces
from tstar_ray.trajectory import Group, Request, Sample


def test_summary_counts_every_sample():
    rng = np.random.default_rng(0)
    trajectories = [make_trajectory(rng, prompt_len=p, blocks=2, block_size=4) for p in (3, 4, 9)]
    verdicts = ["correct", "wrong", "correct"]
    groups = [
        Group(i, Problem(str(i), "", ""), (Sample(t, "", v, float(v == "correct")),))
        for i, (t, v) in enumerate(zip(trajectories, verdicts))
    ]
    found = summarise(groups, Decoding(block_size=4, max_new_tokens=8, stop_ids=(0,)), unscored=2)
    assert (found.problems, found.unscored, found.accuracy) == (3, 2, pytest.approx(2 / 3))
    tokens = sum(t.completion_len for t in trajectories)
    steps = sum(int(t.step_map.max()) for t in trajectories)
    assert found.tpf == pytest.approx(tokens / steps)
    assert found.tpf_with_commits == pytest.approx(tokens / (steps + 6))
    assert found.mean_tokens == pytest.approx(tokens / 3)
    assert found.truncated == 0.0


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.fixture(scope="module")
def engine(model):
    return TorchEngine(model)


def local(engine, judge=lambda trajectory, answer: True, *, lose=()):
    """`grid.Collect` without Ray: one engine, a verdict from ``judge``, groups in ``lose`` never scored."""

    def collect(asked, decoding, samples):
        requests = [
            Request(i, k, p.prompt_ids, sample_seed(7, i, k))
            for i, p in asked.items()
            if i not in lose
            for k in range(samples)
        ]
        found = Collection(failed=[i for i in asked if i in lose], rollout_s=2.0, reward_s=1.0)
        trajectories = engine.generate(requests, decoding)
        for i in [i for i in asked if i not in lose]:
            own = [t for t in trajectories if t.group_id == i]
            verdicts = ["correct" if judge(t, asked[i].problem.answer) else "wrong" for t in own]
            group = tuple(Sample(t, "", v, float(v == "correct")) for t, v in zip(own, verdicts))
            found.groups.append(Group(i, asked[i].problem, group))
            found.verdicts.update(Counter(verdicts))
        return found

    return collect


def prompted(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        PromptedProblem(Problem(str(i), f"question {i}", str(i)), tuple(rng.integers(0, 60, n).tolist()))
        for i, n in enumerate(lengths)
    ]


def settings(folder, *more):
    return load_settings(EvaluateConfig, None, [f"folder={folder}", *more])


def evaluate_one(folder, engine, problems, decoding, samples=1, **options):
    """Through `run_cells`, as an evaluation does; the result and the trajectories it kept."""
    config, cell = settings(folder), Cell("made", decoding, samples)
    (result,) = run_cells(
        config,
        [cell],
        {"made": problems},
        local(engine, **options),
        Store(folder, save_traces=True),
        checksum="0",
    )
    return result, read_traces(folder / "traces" / f"{result.key}.parquet")


@torch.no_grad()
def causal_logprobs(twin, model, ids):
    """[V] log-probs of the next token of an ordinary causal model whose last input is the mask token (no shift)."""
    logits = twin(torch.tensor([[*ids, MASK_ID]])).logits[0, -1].double()
    return torch.log_softmax(logits.masked_fill(model.suppressed_V, -torch.inf), dim=-1)


def test_b_1_equals_autoregressive_scoring(tmp_path, model, engine):
    """Greedy decoding and log-probs of an evaluation at B=1 against transformers' own causal attention, token by token,
    and the accuracy against verdicts on the text that loop writes."""
    twin, problems = plain_twin(model), prompted([1, 5, 8, 13])
    decoding = Decoding(block_size=1, max_new_tokens=12, stop_ids=(7, 11), temperature=0.0)
    written = {}
    for problem in problems:
        ids, scores = list(problem.prompt_ids), []
        while len(ids) < len(problem.prompt_ids) + 12 and (not scores or ids[-1] not in (7, 11)):
            logprobs = causal_logprobs(twin, model, ids)
            ids.append(int(logprobs.argmax()))
            scores.append(float(logprobs.max()))
        written[problem.problem.answer] = (ids[len(problem.prompt_ids) :], scores)

    def even(tokens):
        return sum(tokens) % 2 == 0

    result, groups = evaluate_one(
        tmp_path, engine, problems, decoding, judge=lambda t, answer: even(t.completion_ids.tolist())
    )
    for group in groups:
        trajectory = group.samples[0].trajectory
        tokens, scores = written[group.problem.answer]
        assert trajectory.completion_ids.tolist() == tokens
        np.testing.assert_allclose(trajectory.logprobs, scores, atol=1e-5)
    assert result.accuracy == np.mean([even(tokens) for tokens, _ in written.values()])
    assert result.tpf == 1, "one token a forward"


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_b_beyond_the_length_equals_full_sequence_masked_diffusion(tmp_path, model, engine, strategy):
    """Prompt and answer in one block: plain transformers under no mask at all, LLaDA's sampler written as a loop."""
    twin, problems = plain_twin(model), prompted([3, 9, 20])
    decoding = Decoding(
        block_size=32, max_new_tokens=32, stop_ids=(), strategy=strategy, threshold=0.1, temperature=0.0
    )
    _, groups = evaluate_one(tmp_path, engine, problems, decoding)
    for group, problem in zip(groups, problems, strict=True):
        ids = [*problem.prompt_ids, *[MASK_ID] * (32 - len(problem.prompt_ids))]
        steps, scores, step = {}, {}, 0
        while MASK_ID in ids:
            step += 1
            everything = torch.ones(1, 1, 32, 32, dtype=torch.bool)
            with torch.no_grad():
                logits = twin(torch.tensor([ids]), attention_mask=everything).logits[0].double()
            logprobs = torch.log_softmax(logits.masked_fill(model.suppressed_V, -torch.inf), dim=-1)
            best, token = logprobs.max(dim=-1)
            masked = [p for p in range(32) if ids[p] == MASK_ID]
            chosen = {max(masked, key=lambda p: float(best[p]))}
            if strategy == "dynamic":
                chosen |= {p for p in masked if float(best[p].exp()) > 0.1}
            for p in chosen:
                ids[p], steps[p], scores[p] = int(token[p]), step, float(best[p])
        trajectory = group.samples[0].trajectory
        assert trajectory.token_ids.tolist() == ids
        assert trajectory.step_map.tolist() == [steps[p] for p in sorted(steps)]
        np.testing.assert_allclose(trajectory.logprobs, [scores[p] for p in sorted(scores)], atol=1e-5)
        assert trajectory.blocks == 1


def test_the_grid_is_every_combination_that_fits():
    config = settings(
        "x",
        "grid.blocks=[2,8]",
        "grid.strategies=[dynamic,static,entropy]",
        "grid.thresholds=[0.5,0.9]",
        "grid.tokens_per_step=[1,4]",
        "grid.orders=[learned,sub_blocks]",
        "grid.sub_block=4",
    )
    cells = grid_cells(config.grid, ["a", "b"], (0,))
    # B=2: 2 thresholds, 1 token a step (4 exceed the block), 1 bound; B=8: 2, 2, 1, each in two orders.
    assert len(cells) == 2 * (4 + 10)
    assert len(set(cells)) == len(cells)
    steps = {(c.decoding.block_size, c.decoding.steps) for c in cells if c.decoding.strategy == "static"}
    assert steps == {(2, 2), (8, 8), (8, 2)}
    assert {c.decoding.order for c in cells if c.decoding.block_size == 2} == {"learned"}


def test_scores_of_a_cell_by_hand():
    """Two samples of four problems, 2 1 1 0 right."""
    rng = np.random.default_rng(3)
    right = [2, 1, 1, 0]
    groups = []
    for i, count in enumerate(right):
        trajectories = [make_trajectory(rng, prompt_len=3, blocks=2, block_size=4) for _ in range(2)]
        samples = tuple(
            Sample(replace(t, stop_reason="length" if k else "stop"), "", "correct" if k < count else "wrong", 0.0)
            for k, t in enumerate(trajectories)
        )
        groups.append(Group(i, Problem(str(i), "", ""), samples))
    cell = Cell("made", Decoding(block_size=4, max_new_tokens=8, stop_ids=()), 2)
    found = score(
        "k", cell, Collection(groups=groups, rollout_s=2.0, reward_s=1.0), model="m", checksum="c", problems=5
    )
    assert (found.accuracy, found.problems, found.unscored, found.correct) == (0.5, 4, 1, (2, 1, 1, 0))
    assert found.pass_at == {1: 0.5, 2: 0.75}
    # Variance of the mean: 2 x 0.25 / 16 = 1/32; 0.25 / (1/32) = 8 independent samples.
    assert (found.low, found.high) == pytest.approx(wilson_interval(4, 8))
    tokens = sum(s.trajectory.completion_len for g in groups for s in g.samples)
    assert found.tokens_per_s == tokens / 2
    assert (found.truncated, found.seconds, found.mean_tokens) == (0.5, 3.0, tokens / 8)


def test_finished_cells_are_kept_and_everything_else_is_measured(tmp_path, engine):
    problems = {"made": prompted([5, 6, 9])}
    config = settings(tmp_path, "grid.blocks=[2,4]", "grid.max_new_tokens=8")
    store, asked = Store(tmp_path, save_traces=False), []

    def counting(problems, decoding, samples):
        asked.append(decoding)
        if len(asked) == 2 and stopping:
            raise KeyboardInterrupt
        return local(engine)(problems, decoding, samples)

    def go(config, checksum="aa"):
        asked.clear()
        return run_cells(config, grid_cells(config.grid, ["made"], (7,)), problems, counting, store, checksum=checksum)

    stopping = True
    with pytest.raises(KeyboardInterrupt):
        go(config)
    stopping = False
    first = go(config)
    assert [d.block_size for d in asked] == [4], "the finished one is kept"
    assert go(config) == first
    assert asked == []
    wider = settings(tmp_path, "grid.blocks=[2,4,8]", "grid.max_new_tokens=8")
    assert go(wider)[:2] == first
    assert [d.block_size for d in asked] == [8]
    go(config, checksum="bb")
    assert len(asked) == 2, "other weights are another measurement"
    problems["made"] = prompted([5, 6, 9], seed=1)
    go(config)
    assert len(asked) == 2, "and so are other problems"


def test_a_key_depends_on_all_that_matters(tmp_path):
    problems, cell = prompted([4, 5]), Cell("made", Decoding(block_size=4, max_new_tokens=8, stop_ids=(7,)), 1)
    base = cell_key(cell, settings(tmp_path), problems, "aa")
    assert base == cell_key(cell, settings(tmp_path / "other", "actors.count=5"), problems, "aa")
    others = {
        cell_key(replace(cell, samples=2), settings(tmp_path), problems, "aa"),
        cell_key(replace(cell, decoding=replace(cell.decoding, order="random")), settings(tmp_path), problems, "aa"),
        cell_key(cell, settings(tmp_path, "grid.seed=5"), problems, "aa"),
        cell_key(cell, settings(tmp_path, "reward.score_truncated=true"), problems, "aa"),
        cell_key(cell, settings(tmp_path, "reward.grader=other:grade"), problems, "aa"),
        cell_key(cell, settings(tmp_path), problems[:1], "aa"),
        cell_key(cell, settings(tmp_path), problems, "ab"),
    }
    assert len(others) == 7
    assert base not in others


def test_greedy_evaluation_gives_the_same_twice_and_unscored_problems_are_counted(tmp_path, engine):
    problems = prompted([5, 6, 9, 12])
    decoding = Decoding(block_size=4, max_new_tokens=16, stop_ids=(7,), temperature=0.0)
    judge = {"judge": lambda t, answer: int(t.completion_ids.sum()) % 3 == 0}
    first, groups = evaluate_one(tmp_path / "a", engine, problems, decoding, lose=(2,), **judge)
    again, same = evaluate_one(tmp_path / "b", engine, problems, decoding, lose=(2,), **judge)
    assert first == again
    assert (first.problems, first.unscored, len(first.correct)) == (3, 1, 3)
    for a, b in zip(groups, same, strict=True):
        np.testing.assert_array_equal(a.samples[0].trajectory.token_ids, b.samples[0].trajectory.token_ids)


def test_results_come_back_from_json_and_parquet(tmp_path, engine):
    config = settings(tmp_path, "grid.thresholds=[0.1,0.5]", "grid.blocks=[4]", "grid.max_new_tokens=16")
    cells = grid_cells(config.grid, ["made"], (7,))
    results = run_cells(
        config, cells, {"made": prompted([5, 9])}, local(engine), Store(tmp_path, save_traces=False), checksum="aa"
    )
    write_results(tmp_path, config, results)
    assert read_results(tmp_path) == results
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["cells"][0]["label"] == "made, B=4, dynamic > 0.1, greedy, at most 16 new tokens"
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["threshold"] for row in rows] == [0.1, 0.5]
    (curve,) = curves(results)
    assert rows[0]["aup"] == curve.aup == aup([(r.tpf, 100 * r.accuracy) for r in results])
    with pytest.raises(ValueError, match=r"no results\.json"):
        read_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.samples=4", "samples=4 of greedy decoding are 4 times the same; set temperature"),
        ("grid.blocks=[128]", "max_new_tokens=96 cannot hold a block of 128"),
        ("grid.blocks=[]", "name at least one"),
        ("data=[gsm8k,gsm8k]", "share a name"),
        ("data=[]", "name at least one data set"),
        ("grid.tresholds=[0.5]", "unknown setting; did you mean thresholds"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        settings("x", override)


def test_data_sets_by_name_file_and_mapping():
    config = settings("x", "data=[gsm8k,/d/math500.jsonl,{source: org/set, name: mine, limit: 5}]")
    assert [d.label for d in config.data] == ["gsm8k", "math500", "mine"]
    assert config.data[0].source == "openai/gsm8k"
    assert "boxed" in config.data[1].template
    assert DataSet(source="arithmetic").template == "{question}"


def test_a_run_folder_stands_for_its_trained_model(tmp_path, monkeypatch):
    (tmp_path / "run7" / "final").mkdir(parents=True)
    (tmp_path / "run7" / "final" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load_settings(EvaluateConfig, None, ["model.path=run7"])
    assert config.model_folder == str(tmp_path / "run7" / "final"), "actors may work in another folder"
    assert config.resolve_folder().name == "run7"
    assert config.as_run().model.dtype == "float32"
    assert load_settings(EvaluateConfig, None, ["actors.gpus=1"]).as_run().model.dtype == "bfloat16"


def test_a_run_folder_is_evaluated_as_its_run_was_where_nothing_else_is_given(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    settings = [
        "curriculum.blocks=[2,6]",
        "curriculum.updates=[3]",
        "curriculum.threshold=0.7",
        "rollout.max_new_tokens=60",
        "eval.problems=9",
    ]
    run = load_config(None, [*settings, "data.train=t.jsonl", "data.eval=e.jsonl", "data.prompt=Q {question}"])
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    found = load_settings(EvaluateConfig, None, [f"model.path={tmp_path}", "grid.blocks=[12]", "grid.samples=1"])
    (data,), grid = found.data, found.grid
    assert (data.source, data.template, data.limit) == ("e.jsonl", "Q {question}", 9)
    assert (grid.blocks, grid.thresholds, grid.max_new_tokens) == ((12,), (0.7,), 60)
    found = load_settings(EvaluateConfig, None, [f"model.path={tmp_path}", "data=gsm8k"])
    assert (found.data[0].label, found.grid.blocks) == ("gsm8k", (2, 6))


def test_vllm_is_started_for_the_largest_block_and_the_longest_prompt_of_the_grid():
    data = "data=[arithmetic,{source: s.jsonl, max_prompt_tokens: 3000}]"
    served = load_settings(EvaluateConfig, None, ["actors.engine=vllm", data]).as_run().served_actors.vllm
    assert (served.max_block, served.max_tokens) == (16, 3096)
