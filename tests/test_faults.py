"""Runs that are killed, stopped, told to stop, or lose a part: they end as if nothing had happened, or say why not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import SEVEN, SMALL, environment, marked, no_process_left, read_until, records, row, run, start

from tstar_ray.checkpoint import newest_checkpoint, read_checkpoint
from tstar_ray.model import load_checkpoint
from tstar_ray.traces import read_traces

pytestmark = pytest.mark.cluster


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


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_result(tmp_path, straight):
    """SIGINT to the whole process group, as a terminal sends it, during the second update."""
    settings = [*SEVEN, "run.checkpoint_every=100"]
    job = start(tmp_path, *settings)
    lines = read_until(job, row(1))
    os.killpg(job.pid, signal.SIGINT)
    rest, _ = job.communicate(timeout=120)
    output = "".join(lines) + rest
    assert job.returncode == 130, output
    assert "SIGINT: finishing this update, then saving" in output
    assert "continue with run.resume=" in output
    assert "Traceback" not in output
    made = newest_checkpoint(tmp_path / "job" / "checkpoints", refused=pytest.fail).state["update"]
    assert 1 <= made <= 3
    _, output = run(tmp_path, f"run.resume={tmp_path / 'job'}")  # as the message says: its settings are its own
    assert f"after update {made}" in output
    assert "from here on" not in output
    assert_same_end(tmp_path / "job", straight)


def test_invariant_10_a_killed_driver_resumes_by_the_same_command_to_the_same_bits(tmp_path, straight):
    """SIGKILL to the driver after an update that no checkpoint holds; with the newest checkpoint damaged as well."""
    settings = [*SEVEN, "run.resume=auto"]
    job = start(tmp_path, *settings, TSTAR_TEST_MARK=str(tmp_path))
    read_until(job, row(5))
    job.kill()
    job.wait()
    assert job.returncode == -signal.SIGKILL, "the fault really happened"
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
    no_process_left(str(tmp_path))  # Ray's agents take a minute


def test_the_guard_against_collapse_goes_on_after_a_kill_as_if_there_was_none(tmp_path):
    """A learning rate that ruins the policy: batches collapse, and go back to best weights from before the kill; the
    third one ends the stage. What they cost is in the books, and the end of the stage in a checkpoint."""
    settings = [*SMALL, "curriculum.updates=[6,1]", "learner.lr=0.02", "learner.warmup_updates=0", "run.resume=auto"]
    settings += ["curriculum.rollback.window=1", "curriculum.rollback.limit=2"]
    _, output = run(tmp_path, *settings, "run.name=undisturbed")
    other = tmp_path / "undisturbed"
    rows = [line.split() for line in output.splitlines()]
    collapses = records(other, "collapsed")
    assert len(collapses) == sum("collapsed to" in line for line in output.splitlines()) == 3
    assert read_checkpoint(other / "checkpoints" / f"u{collapses[-1]['update']:05d}").state["curriculum"]["stage"] == 1
    spent = json.loads((other / "result.json").read_text())["budget"]
    assert spent["samples"] == 24 * (len(records(other)) + len(collapses))
    before = next(i for i, row in enumerate(rows) if "collapsed" in row)
    update = int(rows[before - 1][0].split("/")[0])
    job = start(tmp_path, *settings)
    read_until(job, lambda line: line.split()[:1] == [f"{update}/7"])
    job.kill()
    job.wait()
    _, again = run(tmp_path, *settings)
    assert "\nresumed " in again
    assert "collapsed" in again, "against a best that was measured before the kill"
    for kind in ("update", "collapsed"):
        measured = [[(r["update"], r["rollout/accuracy"]) for r in records(f, kind)] for f in (tmp_path / "job", other)]
        assert measured[0] == measured[1]
    after = [json.loads((tmp_path / n / "result.json").read_text())["after"] for n in ("job", "undisturbed")]
    assert after[0] == after[1]


def test_a_lost_learner_rank_takes_the_run_back_to_its_checkpoint_and_to_the_same_bits(tmp_path, straight):
    """SIGKILL to the learner and all rollout actors, as if their node was lost, while rollouts are waited for and a
    checkpoint is one update old: those that take their place ask for weights that nobody has any more."""
    job = start(tmp_path, *SEVEN)
    lines = read_until(job, row(3))
    status = json.loads((tmp_path / "job" / "status.json").read_text())
    victims = [actor["pid"] for role in ("learner", "rollout") for actor in status[role]["actors"].values()]
    assert len(victims) == 3
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    output = "".join(lines) + job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert not any(Path(f"/proc/{victim}").exists() for victim in victims), "the fault really happened"
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
                pid for pid in marked(str(tmp_path)) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title)
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
    scale = [sys.executable, "-m", "cluster.scale", "--job", "job", "--run-dir", str(tmp_path)]
    scale += ["--rollout", "3", "--reward", "2", "--wait", "60"]
    asked = subprocess.run(scale, capture_output=True, text=True, timeout=90, check=False, env=environment())
    output = "".join(lines) + job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert "1 reward actors wanted so far, now 2" in output
    assert "2 rollout actors wanted so far, now 3" in output
    assert "rollout: 3 wanted" in asked.stdout
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
    told = json.loads((folder / "result.json").read_text())["groups"]
    assert told == {"dispatched": ledger["dispatched"], **ledger["ended"]}
    exported = records(folder, "groups")[-1]
    assert told == {name: exported[f"groups_total/{name}"] for name in told}


def test_sigterm_during_the_start_takes_down_what_was_built(tmp_path):
    job = start(tmp_path, *SMALL, TSTAR_TEST_MARK=str(tmp_path))
    lines = read_until(job, lambda line: line.startswith("private Ray cluster"))
    job.terminate()
    rest, _ = job.communicate(timeout=60)
    output = "".join(lines) + rest
    assert job.returncode == 130, output
    assert "stopped at once" in output
    assert "SIGTERM received" not in output, "no stack trace of Ray"
    no_process_left(str(tmp_path))
    assert not records(tmp_path / "job"), "nothing was measured"


def test_a_second_driver_is_refused_and_sigterm_to_the_group_leaves_no_process_behind(tmp_path):
    """Sent as `timeout` does, to the driver and then to its process group; Ray has to go on until it has saved."""
    job = start(
        tmp_path, *SMALL, "curriculum.updates=[50,50]", "run.checkpoint_every=100", TSTAR_TEST_MARK=str(tmp_path)
    )
    read_until(job, lambda line: line.split()[:1] == ["1/100"])
    _, output = run(tmp_path, *SMALL, f"run.resume={tmp_path / 'job'}", expect=2)
    assert f"in use by process {job.pid} on " in output
    assert job.poll() is None
    assert marked(str(tmp_path)), "actors carry the driver's environment"
    os.kill(job.pid, signal.SIGTERM)
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 130, output
    assert "stopped after update" in output
    assert newest_checkpoint(tmp_path / "job" / "checkpoints", refused=pytest.fail).state["update"] >= 1
    no_process_left(str(tmp_path))


def test_sigterm_to_every_process_ends_the_run_at_its_newest_checkpoint(tmp_path):
    """As systemd sends it to a control group: the learner and Ray are gone before the run can save. The driver is held
    until they are; its own signal waits for it."""
    job = start(tmp_path, *SEVEN, TSTAR_TEST_MARK=str(tmp_path))
    lines = read_until(job, row(3))
    job.send_signal(signal.SIGSTOP)
    reached = marked(str(tmp_path))
    assert len(reached) > 5, "driver, Ray, learner and actors"
    for pid in reached:
        os.kill(pid, signal.SIGTERM)
    ranks = json.loads((tmp_path / "job" / "status.json").read_text())["learner"]["actors"].values()
    learner, deadline = {rank["pid"] for rank in ranks}, time.monotonic() + 60
    while learner & set(marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert learner, "a rank of the learner ran"
    assert not learner & set(marked(str(tmp_path))), "the fault really happened"
    job.send_signal(signal.SIGCONT)
    output = "".join(lines) + job.communicate(timeout=120)[0]
    assert job.returncode == 130, output
    assert re.search("updates after [24] are lost", output), output
    assert "building the learner anew" not in output
    assert "continue with run.resume=" in output
    no_process_left(str(tmp_path))
