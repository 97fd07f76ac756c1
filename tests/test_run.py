"""The whole loop as a user runs it: real processes, Ray, DeepSpeed, math verification, signals."""

import json
import re
import socket
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from jobs import SMALL, records, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from tstar_ray.blocks import build_slices
from tstar_ray.checkpoint import newest_checkpoint
from tstar_ray.model import load_checkpoint
from tstar_ray.model_files import inspect_checkpoint
from tstar_ray.traces import read_traces

pytestmark = pytest.mark.cluster
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Two rollout actors, two reward actors, two learner ranks, a stage change with a bridge, several steps."""
    folder, output = run(
        tmp_path_factory.mktemp("full"),
        *SMALL,
        "curriculum.bridge_updates=1",
        "actors.count=2",
        "reward.count=2",
        "learner.ranks=2",
        "learner.steps_per_update=2",
        "rollout.variants=[{}, {sub_block: 2}]",
        "run.report=true",
    )
    return folder, output


def test_a_whole_run_walks_through_its_stages_and_says_so(full):
    folder, output = full
    assert [r["stage"] for r in records(folder)] == ["b4", "b4", "b4-8", "b8", "b8"]
    for text in (
        "private Ray cluster",
        "stage b4-8: rollout block 4, train block 8",
        "trained accuracy",
        "replay check",
    ):
        assert text in output
    result = json.loads((folder / "result.json").read_text())
    assert [e["decoding"]["block_size"] for e in result["before"]] == [4, 8]
    assert [e["decoding"]["block_size"] for e in result["after"]] == [4, 8]
    assert all(0 <= e["low"] <= e["accuracy"] <= e["high"] <= 1 for e in result["before"] + result["after"])


def test_an_update_replays_alone_from_its_saved_trajectories(full, tmp_path):
    """The first update of the run again, without actors: the same loss from the same start, and no bridge's."""
    folder, _ = full
    settings = [*SMALL, "curriculum.bridge_updates=1", "learner.ranks=2", "learner.steps_per_update=2"]
    traces = folder / "traces" / "update-00001.parquet"
    _, output = run(tmp_path, *settings, f"learner.replay={traces}")
    report, first = json.loads(output[output.index("{") : output.rindex("}") + 1]), records(folder)[0]
    assert report["samples"] == 4 * first["groups/trained"] > 0
    assert report["loss"] == pytest.approx(first["learner/loss"], rel=1e-4, abs=1e-7)
    assert report["replay_error"] < 1e-4
    assert not (tmp_path / "job").exists(), "a replay leaves no run folder"


def test_a_diverged_update_ends_the_run_and_keeps_the_batch(tmp_path):
    folder, output = run(
        tmp_path,
        *SMALL,
        "learner.steps_per_update=2",
        "learner.warmup_updates=0",
        "learner.lr=1e30",
        "rollout.problems=16",
        expect=2,
    )
    kept = folder / "failed" / "update-00001.parquet"
    assert "not finite" in output
    assert f"learner.replay={kept}" in output
    assert len(read_traces(kept)) > 0


def test_refill_replaces_filtered_groups_and_counts_them(tmp_path):
    folder, _ = run(
        tmp_path, *SMALL, "curriculum.updates=[1,1]", "rollout.refill=3", "learner.loss.accuracy_band=[0.3,0.7]"
    )
    found = records(folder)
    assert any(r["groups/refilled"] > 0 for r in found)
    for r in found:
        assert r["groups/trained"] <= 6
        assert r["groups/trained"] + r["groups/filtered"] + r["groups/failed"] == 6 + r["groups/refilled"]


def test_the_value_model_learns_in_a_whole_run(tmp_path):
    folder, _ = run(tmp_path, *SMALL, "learner.value.kind=shared", "learner.loss.kl_reference=stage")
    assert all(np.isfinite(r["learner/value_loss"]) for r in records(folder))
    tied = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert not [name for name, _ in tied.named_parameters() if "head.weight" in name and "lm_head" not in name]


def test_samples_of_a_group_are_decoded_as_their_variant_says(full):
    """Every other sample in sub-blocks of 2, which are revealed one after the other."""
    folder, _ = full
    for record in records(folder):
        assert record["rollout/accuracy"] == pytest.approx(
            (record["variant/0/accuracy"] + record["variant/1/accuracy"]) / 2
        )
        assert record["variant/0/tpf"] >= record["variant/1/tpf"] >= 1
    orders = {0: [], 1: []}
    for path in sorted((folder / "traces").glob("*.parquet")):
        for sample in (s for g in read_traces(path) for s in g.samples):
            t = sample.trajectory
            pairs = [t.step_map[i : i + 2] for i in range(t.prompt_len % 2, len(t.step_map) - 1, 2)]
            orders[t.sample % 2] += [a.max() < b.min() for a, b in pairwise(pairs)]
    assert all(orders[1])
    assert not all(orders[0])


def test_invariant_6_every_dispatched_group_ended(full):
    ended = {}
    for r in records(full[0]):
        assert r["groups/trained"] + r["groups/filtered"] + r["groups/failed"] == 6
        ended[r["update"]] = r["groups/trained"]
    state = newest_checkpoint(full[0] / "checkpoints", refused=pytest.fail).state
    assert state["ledger"]["dispatched"] == sum(state["ledger"]["ended"].values()) == 30
    assert state["ledger"]["ended"]["trained"] == sum(ended.values())


def test_invariant_11_stage_changes_are_clean(full):
    """No trajectory mixes block sizes, no batch mixes stages, and each was decoded by exactly the version before."""
    version = 0
    for r in records(full[0]):
        groups = read_traces(full[0] / "traces" / f"update-{r['update']:05d}.parquet")
        trajectories = [s.trajectory for g in groups for s in g.samples]
        assert len(trajectories) == 24
        assert {t.block_size for t in trajectories} == {8 if r["stage"] == "b8" else 4}
        assert {int(v) for t in trajectories for v in t.weight_versions} == {version}
        version += "learner/loss" in r


def test_invariant_1_replay_error_is_measured_in_every_update_that_can(full):
    for r in records(full[0]):
        if "learner/loss" in r and r["stage"] != "b4-8":
            assert r["learner/replay_error"] < 1e-4
        else:
            assert "learner/replay_error" not in r, "not comparable in a bridge"


def test_invariant_2_every_recorded_completion_token_is_a_target_exactly_once(full):
    for file in sorted((full[0] / "traces").glob("*.parquet")):
        for sample in (s for g in read_traces(file) for s in g.samples):
            t = sample.trajectory
            slices = build_slices(
                token_ids=t.token_ids,
                step_map=t.step_map,
                prompt_len=t.prompt_len,
                completion_len=t.completion_len,
                block_size=8,
                mask_id=1,
            )
            positions = (slices.block[:, None] * 8 + np.arange(8))[slices.target]
            assert sorted(positions) == list(range(t.prompt_len, t.prompt_len + t.completion_len))


def test_invariant_4_token_ids_go_end_to_end(full):
    """The text in the traces is what the ids decode to, and the prompt ids are those of the question."""
    tokenizer = inspect_checkpoint("embedded")[0]
    for group in read_traces(full[0] / "traces" / "update-00001.parquet"):
        for sample in group.samples:
            t = sample.trajectory
            assert tokenizer.decode(t.completion_ids, skip_special_tokens=True) == sample.text
            assert tokenizer.decode(t.token_ids[: t.prompt_len]) == group.problem.question


def test_outputs_open_with_plain_tools(full):
    folder, _ = full
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert AutoTokenizer.from_pretrained(folder / "final").mask_token == "<|MASK|>"
    start = load_checkpoint("embedded").model
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), start.hf.parameters()))
    assert moved > 0, "the final model was trained"
    load_checkpoint(folder / "final")  # and is a block-diffusion checkpoint again
    assert yaml.safe_load((folder / "config.yaml").read_text())["learner"]["ranks"] == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("rollout/accuracy")) == 5
    assert {"learner/loss", "learner/entropy", "rollout/tpf", "seconds/train", "idle/learner"} <= set(
        events.Tags()["scalars"]
    )
    assert set(events.Tags()["images"]) == {"stage/curves", "stage/reveals"}
    assert {"settings/text_summary", "samples/b4/text_summary"} <= set(events.Tags()["tensors"])


def test_the_metrics_page_has_every_number_of_a_run_and_no_other(full):
    """In metrics.jsonl; what only other runs have is listed here."""
    written = {
        key for kind in ("update", "evaluation", "groups") for record in records(full[0], kind) for key in record
    }
    numbers = {re.sub(r"^eval_b\d+/", "eval_bN/", re.sub(r"^variant/\d+/", "variant/N/", key)) for key in written}
    numbers = {re.sub(r"^verdict/.*", "verdict/NAME", key) for key in numbers} - {"kind", "update", "time", "stage"}
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().partition("## `step`")[0]
    told = {key for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for key in re.findall(r"`(\S+)`", row)}
    elsewhere = {"learner/value_loss", "learner/explained_variance"}
    assert told - elsewhere == numbers


def test_a_run_ends_with_a_report_of_itself(full):
    folder, output = full
    assert f"report: {folder / 'report.html'}" in output
    page = (folder / "report.html").read_text()
    data = json.loads(page.partition('id="t-data">')[2].partition("</script>")[0])
    assert [u["stage"] for u in data["updates"]] == ["b4", "b4", "b4-8", "b8", "b8"]
    assert (folder / "figures" / "pareto.png").is_file()


def test_what_actors_printed_is_in_the_run_folder(full):
    """DeepSpeed and PyTorch warn in every learner rank, for example; lost actors leave files of their own."""
    folder, _ = full
    status = json.loads((folder / "status.json").read_text())
    (attempt,) = (folder / "logs").iterdir()
    kept = {file.name for file in attempt.iterdir()}
    for name, place in status["learner"]["actors"].items():
        assert place["log"].endswith(f"-{place['pid']}.err")
        assert not Path(place["log"]).exists(), "its cluster is gone"
        assert f"{name}.{place['pid']}.err" in kept
    assert "raylet.out" in kept
    assert not any(b":actor_name:" in file.read_bytes() for file in attempt.iterdir())


def test_a_folder_that_holds_a_run_is_refused(full):
    _, output = run(full[0].parent, *SMALL, timeout=60, expect=2)
    assert "already holds a run; choose another run.name, or continue it with run.resume=" in output


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_gsm8k_with_a_random_qwen3_of_its_own_tokenizer(tmp_path):
    """Real data, a chat template, and a checkpoint that knows nothing: all groups are filtered, nothing breaks."""
    from synthetic import make_checkpoint_folder

    model = make_checkpoint_folder(tmp_path / "model", SHARED / "gsm8k_train.jsonl", model_type="sdar")
    folder, output = run(
        tmp_path,
        *SMALL,
        f"model.path={model}",
        f"data.train={SHARED / 'gsm8k_train.jsonl'}",
        f"data.eval={SHARED / 'gsm8k_test.jsonl'}",
        "data.limit=40",
        "rollout.max_new_tokens=24",
    )
    assert "40 problems to train on, 12 held out" in output
    groups = read_traces(folder / "traces" / "update-00001.parquet")
    first = json.loads((SHARED / "gsm8k_train.jsonl").read_text().splitlines()[0])
    questions = {g.problem.question for g in groups}
    assert len(questions) == 6
    assert first["question"] in {json.loads(x)["question"] for x in (SHARED / "gsm8k_train.jsonl").open()}
    prompt = AutoTokenizer.from_pretrained(model).decode(groups[0].samples[0].trajectory.token_ids[:12])
    assert prompt.startswith("<|im_start|>user")
    for r in records(folder):
        assert r["groups/filtered"] == 6
        assert "learner/loss" not in r, "without contrast there is no update"
        assert r["verdict/unparsable"] == 24


BAD_STARTS = [
    (["actors.gpus=1", "learner.gpus=1"], "3 GPUs asked (2 rollout actors x actors.gpus=1 + 1 learner ranks"),
    (["model.path=/nowhere"], "no readable config.json there"),
    (["data.train=/nowhere.jsonl"], "data.train=/nowhere.jsonl: no such file"),
    (["cluster.address=127.0.0.1:1"], "no Ray cluster answers at '127.0.0.1:1'"),
    (["run.resume=/nowhere"], "run.resume=/nowhere: no run folder"),
    (["run.dir=/proc/x"], "cannot make /proc/x/job"),
    (["reward.grader=nowhere:grade"], "nowhere"),
    (["actors.cont=1"], "unknown setting; did you mean count?"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_STARTS, ids=[s[0].split("=")[0] for s, _ in BAD_STARTS])
def test_a_failing_start_is_a_clear_message_in_seconds(tmp_path, settings, message):
    start = time.monotonic()
    _, output = run(tmp_path, *SMALL, *settings, timeout=90, expect=2)
    assert message in output
    assert "Traceback" not in output
    assert time.monotonic() - start < 60


def test_a_damaged_weight_file_is_named(tmp_path):
    import shutil

    from tstar_ray.model_files import EMBEDDED_FOLDER

    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _, output = run(tmp_path, *SMALL, f"model.path={model}", timeout=90, expect=2)
    assert f"model {model}: its weights cannot be read" in output
    assert "Traceback" not in output


def test_a_dashboard_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, output = run(
            tmp_path, *SMALL, "cluster.dashboard=true", f"cluster.dashboard_port={port}", timeout=90, expect=2
        )
    assert f"port {port} is in use; set cluster.dashboard_port to a free one" in output


def test_print_config_shows_what_would_run_and_runs_nothing(tmp_path):
    _, output = run(tmp_path, "actors.count=7", "--print-config", timeout=60)
    assert yaml.safe_load(output)["actors"]["count"] == 7
    assert not (tmp_path / "job").exists()
