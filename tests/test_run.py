"""The whole loop as a user runs it: real processes, Ray, DeepSpeed, math verification, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tstar_ray.blocks import build_slices
from tstar_ray.checkpoint import newest_checkpoint
from tstar_ray.model import inspect_checkpoint, load_checkpoint
from tstar_ray.traces import read_traces

pytestmark = pytest.mark.cluster
SHARED = Path(__file__).parents[2] / "shared" / "data"
SMALL = [
    "curriculum.blocks=[4,8]",
    "curriculum.updates=[2,2]",
    "rollout.problems=6",
    "rollout.group_size=4",
    "eval.problems=12",
    "eval.every=0",
    "run.checkpoint_every=1",
    "run.report=false",
]


def command(folder, *settings):
    return [sys.executable, "-m", "tstar_ray.run", f"run.dir={folder}", "run.name=job", *settings]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"COLUMNS": "200"} | more


def run(folder, *settings, timeout=300, expect=0, **more):
    """Run to the end; returns the run folder and everything printed."""
    job = subprocess.run(
        command(folder, *settings),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment(**more),
        check=False,
    )
    output = job.stdout + job.stderr
    assert job.returncode == expect, output
    return Path(folder) / "job", output


def records(folder, kind="update"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


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
    """The first update of the run again, without actors: the same loss from the same start."""
    folder, _ = full
    settings = [*SMALL, "learner.ranks=2", "learner.steps_per_update=2"]
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


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_result(tmp_path):
    """SIGINT to the whole process group, as a terminal sends it, during the second update."""
    settings = [*SMALL, "curriculum.updates=[4,3]", "run.checkpoint_every=100"]
    job = subprocess.Popen(
        command(tmp_path, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.split()[:1] == ["1/7"]:
            os.killpg(job.pid, signal.SIGINT)
            break
    rest, _ = job.communicate(timeout=120)
    output = "".join(lines) + rest
    assert job.returncode == 130, output
    assert "SIGINT: finishing this update, then saving" in output
    assert "continue with run.resume=" in output
    assert "Traceback" not in output
    made = newest_checkpoint(tmp_path / "job" / "checkpoints", refused=pytest.fail).state["update"]
    assert 1 <= made <= 3
    _, output = run(tmp_path, *settings, f"run.resume={tmp_path / 'job'}")
    assert f"after update {made}" in output
    assert [r["update"] for r in records(tmp_path / "job")] == list(range(1, 8)), "no update is lost or made twice"
    run(tmp_path, *settings, "run.name=straight")
    same = json.loads((tmp_path / "straight" / "result.json").read_text())
    assert json.loads((tmp_path / "job" / "result.json").read_text())["after"] == same["after"]
    a, b = (load_checkpoint(tmp_path / n / "final").model for n in ("job", "straight"))
    for name, parameter in a.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), dict(b.named_parameters())[name].detach().numpy())


def start(folder, *settings, **more):
    """A run in the background, with its output on a pipe."""
    return subprocess.Popen(
        command(folder, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
        env=environment(**more),
    )


def read_until(job, reached):
    """Lines up to the first one that ``reached`` accepts; fails if the run ends before."""
    lines = []
    for line in job.stdout:
        lines.append(line)
        if reached(line):
            return lines
    raise AssertionError("".join(lines))


def row(update):
    return lambda line: line.split()[:1] == [f"{update}/7"]


SEVEN = [*SMALL, "curriculum.updates=[4,3]", "run.checkpoint_every=2"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Seven updates without any fault: what faulty runs have to end with, bit for bit."""
    return run(tmp_path_factory.mktemp("straight"), *SEVEN)[0]


def assert_same_end(folder, straight):
    """Same evaluations, same accounting, same weights, every update reported once."""
    assert [r["update"] for r in records(folder)] == list(range(1, 8)), "no update is lost or made twice"
    after = [json.loads((f / "result.json").read_text())["after"] for f in (folder, straight)]
    assert after[0] == after[1]
    a, b = (load_checkpoint(f / "final").model for f in (folder, straight))
    for name, parameter in a.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), dict(b.named_parameters())[name].detach().numpy())
    ledgers = [newest_checkpoint(f / "checkpoints", refused=pytest.fail).state["ledger"] for f in (folder, straight)]
    assert ledgers[0] == ledgers[1]


def test_invariant_10_a_killed_driver_resumes_by_the_same_command_to_the_same_bits(tmp_path, straight):
    """SIGKILL to the driver after an update that no checkpoint holds; with the newest checkpoint damaged as well."""
    settings = [*SEVEN, "run.resume=auto"]
    job = start(tmp_path, *settings, TSTAR_TEST_MARK=str(tmp_path))
    read_until(job, row(5))
    job.kill()
    job.wait()
    assert job.returncode == -signal.SIGKILL, "the fault really happened"
    _no_process_left(str(tmp_path))
    folder = tmp_path / "job"
    kept = sorted(p.name for p in (folder / "checkpoints").glob("u*"))
    assert kept == ["u00002", "u00004"], "update 5 is in none of them"
    damaged = next((folder / "checkpoints" / "u00004").rglob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, output = run(tmp_path, *settings)
    assert f"{damaged.name} is damaged" in output
    assert "after update 2" in output
    assert_same_end(folder, straight)
    versions = [
        {int(v) for g in read_traces(p) for s in g.samples for v in s.trajectory.weight_versions}
        for p in sorted((folder / "traces").glob("*.parquet"))
    ]
    assert all(len(found) == 1 for found in versions)
    _, output = run(tmp_path, *settings, timeout=60)
    assert "has ended already" in output


def test_the_guard_against_collapse_goes_on_after_a_kill_as_if_there_was_none(tmp_path):
    """A learning rate that ruins the policy: batches collapse, and go back to best weights from before the kill."""
    settings = [*SMALL, "curriculum.updates=[6,1]", "learner.lr=0.02", "learner.warmup_updates=0", "run.resume=auto"]
    settings += ["curriculum.rollback.window=1", "curriculum.rollback.limit=100"]
    folder, output = run(tmp_path, *settings, "run.name=undisturbed")
    rows = [line.split() for line in output.splitlines()]
    assert sum("collapsed" in row for row in rows) >= 2
    before = next(i for i, row in enumerate(rows) if "collapsed" in row)
    update = int(rows[before - 1][0].split("/")[0])
    job = start(tmp_path, *settings)
    read_until(job, lambda line: line.split()[:1] == [f"{update}/7"])
    job.kill()
    job.wait()
    _, again = run(tmp_path, *settings)
    assert "\nresumed " in again
    assert "collapsed" in again, "against a best that was measured before the kill"
    other = folder.parent / "undisturbed"
    assert [r["rollout/accuracy"] for r in records(tmp_path / "job")] == [r["rollout/accuracy"] for r in records(other)]
    after = [json.loads((tmp_path / n / "result.json").read_text())["after"] for n in ("job", "undisturbed")]
    assert after[0] == after[1]


def test_a_lost_learner_rank_takes_the_run_back_to_its_checkpoint_and_to_the_same_bits(tmp_path, straight):
    """SIGKILL to the learner while a checkpoint is one update old."""
    job = start(tmp_path, *SEVEN)
    lines = read_until(job, row(3))
    victim = json.loads((tmp_path / "job" / "status.json").read_text())["learner"]["actors"]["learner-0"]["pid"]
    os.kill(victim, signal.SIGKILL)
    output = "".join(lines) + job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert not Path(f"/proc/{victim}").exists(), "the fault really happened"
    assert "building the learner anew" in output, "and the recovery ran"
    assert "after update 2" in output
    assert_same_end(tmp_path / "job", straight)


def test_actors_that_die_while_a_run_starts_are_replaced(tmp_path):
    job = start(tmp_path, *SMALL, TSTAR_TEST_MARK=str(tmp_path))
    victims = []
    for title in (b"ray::RolloutWorker", b"ray::LearnerRank"):
        deadline, found = time.monotonic() + 120, []
        while not found and time.monotonic() < deadline:
            time.sleep(0.05)
            found = [
                pid for pid in _marked(str(tmp_path)) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title)
            ]
        os.kill(found[0], signal.SIGKILL)
        victims.append(found[0])
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert "takes its place" in output
    assert "building the learner anew" in output
    assert [r["update"] for r in records(tmp_path / "job")] == [1, 2, 3, 4]
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims), "the faults really happened"


def test_a_stopped_learner_rank_is_noticed_and_its_group_rebuilt(tmp_path):
    """SIGSTOP to one of two ranks: the other waits in a collective."""
    job = start(tmp_path, *SEVEN, "learner.ranks=2", "learner.silent_s=6", "curriculum.updates=[40,3]")
    lines = read_until(job, lambda line: line.split()[:1] == ["2/43"])
    actors = json.loads((tmp_path / "job" / "status.json").read_text())["learner"]["actors"]
    victim = actors["learner-1"]["pid"]
    os.kill(victim, signal.SIGSTOP)
    lines += read_until(job, lambda line: line.startswith("resumed "))
    lines += read_until(job, lambda line: line.split()[:1] == ["4/43"])
    assert not Path(f"/proc/{victim}").exists(), "it was really ended"
    job.terminate()
    output = "".join(lines) + job.communicate(timeout=120)[0]
    assert job.returncode == 130, output
    assert "rank 1 gave no sign of life" in output
    again = json.loads((tmp_path / "job" / "status.json").read_text())["learner"]["actors"]
    assert {a["pid"] for a in again.values()}.isdisjoint(a["pid"] for a in actors.values()), "all ranks are new"


def test_invariant_5_fresh_under_an_asynchronous_loop_with_faults(tmp_path):
    """Batches decoded ahead, a rollout actor killed and another stopped, actors added: the bound and the books hold."""
    settings = [
        *SMALL,
        "curriculum.updates=[8,6]",
        "rollout.max_staleness=2",
        "rollout.problems=12",
        "rollout.refill=1",
        "actors.max_batch=16",
        "actors.probe_s=1",
        "actors.probe_failures=3",
        "run.checkpoint_every=3",
        "eval.every=4",
        "eval.problems_during=8",
    ]
    job = start(tmp_path, *settings)
    folder = tmp_path / "job"

    def pid(name):
        return json.loads((folder / "status.json").read_text())["rollout"]["actors"][name]["pid"]

    lines = read_until(job, lambda line: line.split()[:1] == ["2/14"])
    killed = pid("rollout-0")
    os.kill(killed, signal.SIGKILL)
    lines += read_until(job, lambda line: line.split()[:1] == ["4/14"])
    stopped = pid("rollout-1")
    os.kill(stopped, signal.SIGSTOP)
    scale = [sys.executable, "-m", "cluster.scale", str(folder), "--reward", "2", "--wait", "60"]
    asked = subprocess.run(scale, capture_output=True, text=True, timeout=90, check=False, env=environment())
    output = "".join(lines) + job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert "1 reward actors wanted so far, now 2" in output
    assert "reward: 2 wanted" in asked.stdout
    assert not Path(f"/proc/{killed}").exists()
    assert not Path(f"/proc/{stopped}").exists()
    for name in ("rollout-0", "rollout-1"):
        assert f"{name} was lost" in output
        assert f"{name}-r1 takes its place" in output
    found = records(folder)
    assert [r["update"] for r in found] == list(range(1, 15))
    version, ages = 0, set()
    for r in found:
        groups = read_traces(folder / "traces" / f"update-{r['update']:05d}.parquet")
        trajectories = [s.trajectory for g in groups for s in g.samples]
        assert {t.block_size for t in trajectories} == {8 if r["stage"] == "b8" else 4}
        age = [version - int(v) for t in trajectories for v in t.weight_versions]
        assert 0 <= min(age) <= max(age) <= 2
        assert r["rollout/staleness_max"] == max(age)
        ages |= set(age)
        version += "learner/loss" in r
    assert max(ages) > 0, "some batch was decoded ahead"
    ids = [g.group_id for p in sorted((folder / "traces").glob("*")) for g in read_traces(p)]
    assert len(ids) == len(set(ids)), "no group is trained twice"
    ledger = newest_checkpoint(folder / "checkpoints", refused=pytest.fail).state["ledger"]
    assert ledger["dispatched"] == sum(ledger["ended"].values())
    assert ledger["ended"]["trained"] == sum(r["groups/trained"] for r in found)
    assert ledger["ended"]["filtered"] == sum(r["groups/filtered"] for r in found)
    assert ledger["ended"]["cancelled"] == ledger["ended"]["failed"] == 0, "nothing is dispatched past a stage's end"


def test_sigterm_leaves_no_process_behind(tmp_path):
    job = subprocess.Popen(
        command(tmp_path, *SMALL, "curriculum.updates=[50,50]"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(TSTAR_TEST_MARK=str(tmp_path)),
    )
    for line in job.stdout:
        if line.split()[:1] == ["1/100"]:
            break
    assert _marked(str(tmp_path)), "actors carry the driver's environment"
    job.terminate()
    job.communicate(timeout=120)
    assert job.returncode == 130
    _no_process_left(str(tmp_path))


def _no_process_left(mark):
    deadline = time.monotonic() + 120
    while _marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _marked(mark)


def _marked(mark):
    """Processes whose environment carries the mark of a test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TSTAR_TEST_MARK={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


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

    from tstar_ray.model import EMBEDDED_FOLDER

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
