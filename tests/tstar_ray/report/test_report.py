"""What stands in a report: numbers by hand, traces token by token, text that stays text."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from report_runs import NASTY, evaluation, make_run

from tstar_ray.config import ConfigError, ModelConfig
from tstar_ray.model_files import EMBEDDED_FOLDER, inspect_checkpoint
from tstar_ray.report import figures, write_experiment_report, write_run_report
from tstar_ray.report.__main__ import main
from tstar_ray.report.experiment import arm_rows, arm_settings, arm_stability, first_schedules
from tstar_ray.report.figures import smooth
from tstar_ray.report.summary import block_scores, stability
from tstar_ray.report.viewer import PROBLEMS, UPDATES, load_decoder, viewer_data
from tstar_ray.run import add_report
from tstar_ray.run_folder import read_run
from tstar_ray.traces import read_traces


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "made")
    write_run_report(folder)
    return folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="t-data">(.*?)</script>', page, re.S).group(1))


def test_the_page_is_one_file_that_needs_nothing_else(run_folder):
    page = (run_folder / "report.html").read_text()
    for element in ("<script src", '<link rel="stylesheet', "@import", "url(http", 'src="http'):
        assert element not in page
    outside = [u for u in re.findall(r'(?:href|src)="([^"]+)"', page) if not u.startswith(("#", "data:"))]
    assert outside == []
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "figures bring their own ids"
    assert page.count("<svg") == 4
    assert "#2f6bd8" not in page[page.index("<main") :], "figures follow the theme"


def test_figures_stand_beside_it(run_folder):
    for name in ("curves", "pareto", "heatmaps", "schedule"):
        assert (run_folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (run_folder / "figures" / f"{name}.svg").read_text()


def test_scores_and_settings_are_on_the_page(run_folder):
    page = (run_folder / "report.html").read_text()
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page[page.index("<main") :])))
    assert "B=8 50.0 % 45 % – 55 % 3.00 60.0 % 55 % – 65 % 3.30 1.65" in text
    assert "curriculum.blocks [4, 8]" in text
    assert "rollout.group_size" not in text, "defaults are not listed as changes"
    assert "group_size: 8" in text, "but all settings are there"
    assert "No stage got faster but worse" in text


def test_text_of_a_problem_cannot_become_markup(run_folder):
    page = (run_folder / "report.html").read_text()
    assert '<b onclick="x">' not in page
    questions = {p["question"] for u in data_of(page)["updates"] for p in u["problems"]}
    assert NASTY in questions


def test_the_viewer_holds_the_trajectories_token_by_token(run_folder):
    data = data_of((run_folder / "report.html").read_text())
    tokenizer = inspect_checkpoint("embedded")[0]
    assert [(u["update"], u["stage"]) for u in data["updates"]] == [(i, "b4" if i < 5 else "b8") for i in range(1, 9)]
    for entry in data["updates"]:
        groups = read_traces(run_folder / "traces" / f"update-{entry['update']:05d}.parquet")
        assert entry["problems"][0]["question"] == NASTY, "the one whose samples disagree comes first"
        for problem in entry["problems"]:
            group = next(g for g in groups if g.problem.question == problem["question"])
            assert (problem["right"], problem["of"]) == (sum(s.reward for s in group.samples), 2)
            for shown in problem["samples"]:
                (sample,) = [s for s in group.samples if s.trajectory.step_map.tolist() == shown["steps"]]
                t = sample.trajectory
                assert shown["verdict"] == sample.verdict
                ids = t.token_ids[t.prompt_len :].tolist()
                assert [data["texts"][i] for i in shown["tokens"]] == [tokenizer.decode([i]) for i in ids]
                assert shown["prompt"] == tokenizer.decode(t.token_ids[: t.prompt_len].tolist())
                np.testing.assert_allclose(shown["p"], np.exp(t.logprobs), atol=6e-4)
                assert (shown["B"], shown["length"]) == (t.block_size, t.completion_len)
                assert shown["offset"] == t.prompt_len % t.block_size
    first = data["updates"][0]["problems"][0]["samples"]
    assert [s["verdict"] for s in first] == ["correct", "wrong"]


def test_long_runs_show_both_ends_of_every_stage(tmp_path):
    run = read_run(make_run(tmp_path / "long", updates=(20, 30)))
    data = viewer_data(run, str)
    shown = [u["update"] for u in data["updates"]]
    assert len(shown) == UPDATES
    assert {1, 20, 21, 50} <= set(shown)
    assert max(np.diff(shown)) <= 8, "the rest is spread evenly"
    assert all(len(u["problems"]) <= PROBLEMS for u in data["updates"])


def test_the_viewer_says_how_each_sample_was_decoded(tmp_path):
    settings = ["rollout.variants=[{}, {threshold: 0.6, sub_block: 4}]"]
    data = viewer_data(read_run(make_run(tmp_path / "varied", settings=settings)), str)
    told = [[s["how"] for s in p["samples"]] for u in data["updates"] for p in u["problems"]]
    # The first problem shown has sample 0 wrong and sample 1 right; the right one stands first.
    assert told[:2] == [
        ["threshold 0.6, sub-blocks of 4", "as the stage says"],
        ["as the stage says", "threshold 0.6, sub-blocks of 4"],
    ]
    plain = viewer_data(read_run(make_run(tmp_path / "plain")), str)
    assert {s["how"] for u in plain["updates"] for p in u["problems"] for s in p["samples"]} == {""}


def test_the_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("tstar_ray.report.viewer.TOKENS", 200)
    data = viewer_data(read_run(make_run(tmp_path / "bounded")), str)
    count = sum(len(s["tokens"]) for u in data["updates"] for p in u["problems"] for s in p["samples"])
    assert 0 < count <= 200


def test_without_its_tokenizer_tokens_are_shown_as_ids(tmp_path):
    decode, note = load_decoder(ModelConfig(path=str(tmp_path / "gone")))
    assert decode([5, 7]) == "⟨5⟩⟨7⟩"
    assert "shown as ids" in note


def test_a_mask_token_that_only_the_settings_name_is_no_obstacle(tmp_path):
    model = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    for file, name in (("config.json", "mask_token_id"), ("tokenizer_config.json", "mask_token")):
        values = json.loads((model / file).read_text())
        del values[name]
        (model / file).write_text(json.dumps(values))
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text().replace("<|MASK|>", "<|hole|>"))
    assert "no mask token" in load_decoder(ModelConfig(path=str(model)))[1]
    decode, note = load_decoder(ModelConfig(path=str(model), mask_token_id=1))
    assert (decode([1]), note) == ("<|hole|>", "")


def test_stability_of_each_stage_by_hand(tmp_path):
    first, second = stability(read_run(make_run(tmp_path / "up")))
    assert (first.name, first.block, first.updates) == ("b4", "4", 4)
    # Gradient norms 1 9 1 1: one above five times the median. KL 1 2 3 4: none.
    assert (first.grad_spikes, first.kl_spikes, first.alarm) == (1, 0, False)
    assert first.drift.accuracy == pytest.approx(0.1 * 2 / 3)
    assert (first.drawdown, second.drawdown) == (0, 0)
    worse = stability(read_run(make_run(tmp_path / "down", gain=-0.3)))
    assert [s.alarm for s in worse] == [True, True]
    assert worse[0].drawdown == pytest.approx(0.3)
    # Held out on the way, .6 and .6 in the second stage: it did not fall. The table at the end, on others: .2.
    metrics = tmp_path / "down" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    for update in (8, 6):
        at = next(i for i, line in enumerate(lines) if f'"update", "update": {update},' in line)
        lines.insert(at, json.dumps(evaluation(update, 8, 0.6, 3.0)) + "\n")
    metrics.write_text("".join(lines))
    second = stability(read_run(tmp_path / "down"))[1]
    assert (second.drawdown, second.drawdown_of) == (0, "held-out")
    page = write_run_report(tmp_path / "down").read_text()
    assert re.sub(r"\s+", " ", page).count("Faster but worse: in b4, b8") == 1


def test_a_run_that_goes_on_shows_where_it_is(tmp_path):
    run = make_run(tmp_path / "young", ended=False)
    (row, _) = block_scores(read_run(run))
    assert (row.start.accuracy, row.end) == (0.6, None)
    assert "has not ended yet" in write_run_report(run).read_text()


def test_smooth_is_a_running_mean_with_short_ends():
    np.testing.assert_allclose(smooth([1, 2, 3, 4, 9], 3), [1.5, 2, 3, 16 / 3, 6.5])
    np.testing.assert_allclose(smooth([4.0]), [4])


def test_an_experiment_compares_arms_over_seeds(tmp_path):
    """Two seeds of one arm end 10 and 20 points above the start at both sizes, one seed of the other 30 below."""
    arms = {
        "tstar": [make_run(tmp_path / "t1", gain=0.1), make_run(tmp_path / "t2", seed=1, gain=0.2)],
        "direct": [make_run(tmp_path / "d1", gain=-0.3)],
    }
    runs = {arm: [read_run(path) for path in paths] for arm, paths in arms.items()}
    rows = {(r.arm, r.block_size): r for r in arm_rows(runs)}
    row = rows["tstar", 8]
    assert (row.accuracy.mean, row.accuracy.worst) == (pytest.approx(0.65), pytest.approx(0.6))
    assert row.accuracy.deviation == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert (row.below_start, rows["direct", 8].below_start) == (0, 1)
    found = {s.arm: s for s in arm_stability(runs)}
    assert (found["tstar"].alarms, found["direct"].alarms) == (0, 1)
    assert (found["tstar"].seeds, found["tstar"].grad_spikes) == (2, 1)
    assert (found["tstar"].samples, found["tstar"].learner_tokens) == (64, 8000)
    assert found["direct"].drawdown == pytest.approx(0.3)
    assert len(first_schedules(runs["tstar"])) == 2
    extra = {"further": lambda: figures.arms_over_updates(runs)}
    page = write_experiment_report(
        arms, tmp_path / "all", title="A <comparison>", said=["1 < 2"], drawn=extra
    ).read_text()
    assert "<li>1 &lt; 2</li>" in page
    assert '<a href="../t1/">../t1</a>' in page
    shared, own = arm_settings({"a": runs["tstar"][:1], "b": [read_run(make_run(tmp_path / "l", updates=(2, 3)))]})
    assert shared == [("curriculum.blocks", "[4, 8]")]
    assert own == [("a", "curriculum.updates", "[4, 4]"), ("b", "curriculum.updates", "[2, 3]")]
    assert "A &lt;comparison&gt;" in page
    assert "1 of 1 seeds of direct" in page
    assert (tmp_path / "all" / "figures" / "armspareto.png").is_file()
    assert page.count("<svg") == 5, "arms, points, the further one, heat-maps of each arm"
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_command(tmp_path, capsys):
    run = make_run(tmp_path / "r")
    assert main([str(run)]) == 0
    assert (run / "report.html").is_file()
    assert main(["--experiment", str(tmp_path / "out"), f"a={run},{run}"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    capsys.readouterr()
    assert main([str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert main(["--experiment", str(tmp_path / "out"), str(run)]) == 2
    assert "write ARM=RUN" in capsys.readouterr().err


def test_a_run_without_updates_or_traces(tmp_path):
    run = make_run(tmp_path / "r")
    for file in (run / "traces").iterdir():
        file.unlink()
    page = write_run_report(run).read_text()
    assert 'id="traces"' not in page
    assert page.count("<svg") == 2
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no update yet"):
        write_run_report(run)


def test_a_report_that_fails_does_not_fail_the_run(tmp_path):
    said = []
    add_report(tmp_path, said.append)
    assert len(said) == 1
    assert said[0].startswith("no report (ConfigError: ")
    run = make_run(tmp_path / "r")
    (run / "traces" / "update-00003.parquet").write_bytes(b"damaged")
    add_report(run, said.append)
    assert said[1].startswith("no report (ArrowInvalid: ")
    assert f"python -m tstar_ray.report {run}" in said[1]
