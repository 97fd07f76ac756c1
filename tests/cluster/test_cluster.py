"""Cluster parts on a real private Ray: weights that must be proven, lost actors, foreign clusters."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.rollout import remote_class as rollout_class
from cluster.placement import wait_ready
from cluster.pool import ActorPool, Supervision
from cluster.session import ClusterError, connect
from cluster.weights import ObjectStoreTransport
from reward.actor import remote_class as reward_class
from tstar_ray.collection import Limits
from tstar_ray.collector import Collector
from tstar_ray.config import ActorsConfig, ClusterConfig, ModelConfig
from tstar_ray.data import PromptedProblem
from tstar_ray.decoding import Decoding
from tstar_ray.model import load_checkpoint
from tstar_ray.model_files import inspect_checkpoint
from tstar_ray.problems import Problem
from tstar_ray.weights import Proof, checksum, flatten

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def session():
    with connect(ClusterConfig(), namespace="test") as found:
        yield found


@pytest.fixture(scope="module")
def start_weights():
    return flatten(load_checkpoint("embedded").model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_bit_for_bit(session, dtype):
    flat = torch.randn(1001).to(dtype)
    published = ObjectStoreTransport().publish(flat, 2)
    found = ObjectStoreTransport().fetch(published)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), flat.view(torch.uint8))
    assert published.size_bytes == flat.numel() * flat.itemsize


def test_invariant_8_a_rollout_actor_refuses_versions_newer_than_the_one_it_proved(session, start_weights):
    transport = ObjectStoreTransport()
    actor = rollout_class().options(num_cpus=0.1).remote(0, ModelConfig(), ActorsConfig(), threads=1, weights=transport)
    wait_ready({"rollout-0": actor.ready.remote()}, 120, "actor")
    other = start_weights + 0.01
    proof = ray.get(actor.load_weights.remote(transport.publish(other, 7)), timeout=60)
    assert proof == Proof(7, checksum(other))
    decoding = Decoding(block_size=4, max_new_tokens=16, stop_ids=(0,))
    assert ray.get(actor.generate.remote([], decoding, 7), timeout=60) == []
    with pytest.raises(ray.exceptions.RayTaskError, match="serves weights 7, asked to decode with 8"):
        ray.get(actor.generate.remote([], decoding, 8), timeout=60)
    ray.kill(actor)


SHAKY = '''
import os, signal, time
from reward.grading import Verdict, grade as real

def grade(text, answer):
    """Hangs on one answer of the batch, dies on another, and grades the rest."""
    if answer == "11":
        time.sleep(600)
    if answer == "12":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(text, answer)
'''


@pytest.fixture(scope="module")
def parts(session, start_weights, tmp_path_factory):
    """A collector with real rollout and reward actors and weights served as version 0."""
    folder = tmp_path_factory.mktemp("grader")
    (folder / "shaky_grader.py").write_text(SHAKY)
    events = []
    transport, rollout, reward = ObjectStoreTransport(), rollout_class(), reward_class()
    environment = {"env_vars": {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}}
    rules = Supervision(start_s=60, probe_s=1, probe_failures=4, stall_s=60, max_restarts=4, backoff_s=0.1)

    def make_rollout(index, name):
        return rollout.options(name=name, num_cpus=0.1).remote(
            index, ModelConfig(), ActorsConfig(max_batch=2), threads=1, weights=transport
        )

    def make_reward(index, name):
        return reward.options(name=name, num_cpus=0.1, runtime_env=environment).remote(
            index, workers=1, deadline_s=1.0, grader="shaky_grader:grade"
        )

    common = {"supervision": rules, "on_event": events.append}
    rollouts = ActorPool("rollout", make_rollout, count=2, serves_weights=True, **common)
    rewards = ActorPool("reward", make_reward, count=1, serves_weights=False, **common)
    limits = Limits(rollout_s=120, reward_s=5, start_s=60, max_attempts=2)
    collector = Collector(rollouts, rewards, limits, seed=1, score_truncated=False, on_event=events.append)
    collector.serve(transport.publish(start_weights, 0))
    yield collector, rollouts, rewards, events
    rollouts.stop()
    rewards.stop()


def collect(collector, problems, decoding, *, group_size):
    return collector.finish(collector.dispatch(problems, decoding, group_size=group_size))


def ask(count, answers=None, first=0):
    tokenizer = inspect_checkpoint("embedded")[0]
    question = "Mia has 12 pens. Mia buys 5. Mia loses 7. How many pens?"
    ids = tuple(tokenizer(question)["input_ids"])
    answers = answers or ["10"] * count
    return {first + i: PromptedProblem(Problem(str(i), question, answers[i]), ids) for i in range(count)}


DECODING = Decoding(block_size=4, max_new_tokens=64, stop_ids=(0,))


def test_groups_come_back_whole_and_in_order(parts):
    found = collect(parts[0], ask(5, first=40), DECODING, group_size=3)
    assert [g.group_id for g in found.groups] == [40, 41, 42, 43, 44]
    for group in found.groups:
        assert [s.trajectory.sample for s in group.samples] == [0, 1, 2]
        prompts = {s.trajectory.token_ids[: s.trajectory.prompt_len].tobytes() for s in group.samples}
        assert len(prompts) == 1
    assert sum(found.verdicts.values()) == 15
    assert (found.failed, found.retries) == ([], 0)


def test_trap_46_a_completion_cut_at_the_cap_earns_nothing_whatever_it_says(parts, monkeypatch):
    """The same samples with the cap where the shortest right one ended, and no stop token to end it."""
    collector = parts[0]
    whole = collect(collector, ask(6, first=30), DECODING, group_size=2)
    right = [s.trajectory for g in whole.groups for s in g.samples if s.verdict == "correct" and s.reward == 1]
    assert right, "some answers are right and end by themselves"
    shortest = min(len(t.token_ids) - t.prompt_len for t in right)
    for allowed in (False, True):
        monkeypatch.setattr(collector, "_score_truncated", allowed)
        cap = replace(DECODING, max_new_tokens=shortest, stop_ids=())
        samples = [s for g in collect(collector, ask(6, first=30), cap, group_size=2).groups for s in g.samples]
        assert {s.trajectory.stop_reason for s in samples} == {"length"}
        right = [s for s in samples if s.verdict == ("correct" if allowed else "truncated")]
        assert right, "accuracy counts what a reward counts"
        assert {s.reward for s in right} == {float(allowed)}
        assert {s.verdict for s in samples} - {right[0].verdict} <= {"wrong", "unparsable"}


def test_invariant_7_a_verifier_that_hangs_or_dies_gives_no_reward_and_its_group_fails(parts):
    """Every sample of the second and third group kills or hangs its verifier: none of them is scored 0."""
    found = collect(parts[0], ask(3, ["10", "11", "12"], first=50), DECODING, group_size=2)
    assert [g.group_id for g in found.groups] == [50]
    assert sorted(found.failed) == [51, 52]
    assert found.verdicts["timeout"] >= 2
    assert found.verdicts["crashed"] >= 2
    assert found.retries == 4, "each of their samples was replaced once before they were given up"
    assert all(s.verdict in ("correct", "wrong", "unparsable") for s in found.groups[0].samples)


def test_trap_34_a_killed_rollout_actor_is_replaced_proves_its_weights_and_nothing_is_lost(parts):
    collector, rollouts, _, events = parts
    name = next(iter(rollouts.handles))
    victim = rollouts.places[name].pid
    killer = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(.3); os.kill({victim}, 9)"])
    found = collect(collector, ask(60, first=100), DECODING, group_size=4)
    killer.wait()
    assert not Path(f"/proc/{victim}").exists(), "the fault really happened"
    assert rollouts.restarts == 1, "and the recovery ran"
    assert name not in rollouts.handles
    assert any(f"{name} was lost" in e and "takes its place" in e for e in events)
    assert [g.group_id for g in found.groups] == list(range(100, 160))
    assert all(len(g.samples) == 4 for g in found.groups)
    assert {int(v) for g in found.groups for s in g.samples for v in s.trajectory.weight_versions} == {0}


def test_a_killed_reward_actor_is_replaced_and_its_samples_are_scored_again(parts):
    collector, _, rewards, _ = parts
    ray.kill(next(iter(rewards.handles.values())))
    found = collect(collector, ask(4, first=300), DECODING, group_size=2)
    assert rewards.restarts == 1, "the recovery ran"
    assert [len(g.samples) for g in found.groups] == [2] * 4


def test_rollouts_go_on_while_something_else_is_waited_for_and_take_new_weights_in_flight(parts, start_weights):
    """Two batches and an evaluation at once; weights change while they are decoded."""
    collector = parts[0]
    long = replace(DECODING, max_new_tokens=1024, stop_ids=())
    first = collector.dispatch(ask(8, first=400), long, group_size=4)
    second = collector.dispatch(ask(4, first=410), long, group_size=4)
    slow = ray.remote(lambda: time.sleep(1.0)).options(num_cpus=0).remote()
    done, left = collector.wait([slow], timeout=30)
    assert (done, left) == ([slow], [])
    assert not first.done, "one second is not enough"
    assert collector.rollouts.handles
    collector.serve(ObjectStoreTransport().publish(start_weights * 1.001, 1))
    urgent = collector.dispatch(ask(1, first=-1), DECODING, group_size=1, urgent=True)
    assert [g.group_id for g in collector.finish(urgent).groups] == [-1]
    assert not second.done, "an evaluation goes before what waits"
    versions = [s.trajectory.weight_versions for g in collector.finish(first).groups for s in g.samples]
    assert any(set(v) == {0, 1} for v in versions), "a sequence saw both"
    assert all((np.diff(v) >= 0).all() for v in versions)
    assert [g.group_id for g in collector.finish(second).groups] == [410, 411, 412, 413]
    assert collector.take_busy_seconds() > 1
    collector.serve(ObjectStoreTransport().publish(start_weights, 2))


def test_work_ahead_is_sent_in_small_units_up_to_a_number_in_flight(parts, start_weights):
    collector, rollouts, rewards, events = parts
    limits = Limits(rollout_s=120, reward_s=5, start_s=60, max_attempts=2, unit=7, in_flight=10)
    ahead = Collector(rollouts, rewards, limits, seed=1, score_truncated=False, on_event=events.append)
    ahead.serve(ObjectStoreTransport().publish(start_weights, 3))
    batch = ahead.dispatch(ask(19, first=700), DECODING, group_size=3)
    sent = sorted((job.actor, len(job.payload)) for job in ahead._rolling.values())
    assert sent == sorted((name, 6) for name in rollouts.handles for _ in range(2)), "2 groups a unit, 10 reached by 2"
    assert [len(unit) for unit in batch._units] == [6] * (9 - len(sent)) + [3]
    batch._again = [request for unit in batch._units for request in unit]
    batch._units.clear()
    ahead._send()
    assert max(len(unit) for unit in batch._units) == 7, "samples that are tried again form units as well"
    assert [g.group_id for g in ahead.finish(batch).groups] == list(range(700, 719))
    collector.serve(ObjectStoreTransport().publish(start_weights, 4))


def test_a_cancelled_batch_frees_its_actors_at_once(parts, start_weights):
    collector, rollouts, _, _ = parts
    endless = replace(DECODING, max_new_tokens=4096, stop_ids=())
    batch = collector.dispatch(ask(4, first=500), endless, group_size=8)
    collector.wait([ray.remote(lambda: time.sleep(0.5)).options(num_cpus=0).remote()], timeout=30)
    assert not batch.done
    rollouts.serve(ObjectStoreTransport().publish(start_weights, 5))
    assert not rollouts.handles, "also those that prove new weights just then"
    collector.cancel(batch)
    start = time.monotonic()
    found = collect(collector, ask(2, first=510), DECODING, group_size=2)
    assert time.monotonic() - start < 20, "they would have decoded 32 x 4096 tokens"
    assert [g.group_id for g in found.groups] == [510, 511]
    assert not batch.found.groups
    assert rollouts.handles.keys() == rollouts.names, "and no actor was lost over it"


def test_a_batch_may_be_added_to_when_it_is_done(parts):
    collector, asked = parts[0], []

    def more(batch):
        if not asked:
            asked.append([g.group_id for g in batch.found.groups])
            collector.dispatch(ask(1, first=610), DECODING, group_size=2, into=batch, when_done=more)

    batch = collector.dispatch(ask(2, first=600), DECODING, group_size=2, when_done=more)
    assert [g.group_id for g in collector.finish(batch).groups] == [600, 601, 610]
    assert asked == [[600, 601]]


def test_invariant_12_an_actor_that_cannot_be_placed_is_named_in_bounded_time(session):
    actor = rollout_class().options(num_cpus=64).remote(0, ModelConfig(), ActorsConfig(), threads=1, weights=None)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"actors not ready after 2 s: big-0. The cluster has 2 CPU, 0 GPU"):
        wait_ready({"big-0": actor.ready.remote()}, 2, "actors")
    assert time.monotonic() - start < 10
    ray.kill(actor)


def test_an_actors_own_message_reaches_the_user(session):
    actor = (
        rollout_class()
        .options(num_cpus=0.1)
        .remote(0, ModelConfig(path="/nowhere"), ActorsConfig(), threads=1, weights=ObjectStoreTransport())
    )
    with pytest.raises(ClusterError, match=r"rollout-0 did not start: .*no readable config.json there"):
        wait_ready({"rollout-0": actor.ready.remote()}, 60, "actors")


FOREIGN = """
import ray, time, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], namespace="foreign")
@ray.remote(num_cpus=0)
class Counter:
    def __init__(self): self.n = 0
    def add(self): self.n += 1; return self.n
c = Counter.options(name="kept").remote()
print(ray.get(c.add.remote()), flush=True)
sys.stdin.readline()
print(ray.get(c.add.remote()), flush=True)
"""

OURS = """
import os
import psutil
from ipaddress import ip_address
from cluster.session import connect
from tstar_ray.config import ClusterConfig
before = dict(os.environ)
with connect(ClusterConfig(), namespace="ours") as session:
    assert session.private and session.temp_dir.is_dir()
    folder = session.temp_dir
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    heard = {c.laddr.ip for p in ours for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert heard and all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in heard), heard
assert not folder.exists(), folder
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
assert not {k for k in changed if k.startswith("RAY_AUTH")}, changed
print("closed")
"""


def test_invariant_12_another_cluster_on_the_machine_is_left_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled",
        "HOME": str(tmp_path),
    }
    temp = f"/tmp/foreign-{os.getpid()}"
    foreign = subprocess.Popen(
        [sys.executable, "-c", FOREIGN, temp],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert foreign.stdout.readline().strip() == "1"
        del environment["RAY_AUTH_MODE"]
        ours = subprocess.run(
            [sys.executable, "-c", OURS], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        assert ours.stdout.strip().endswith("closed"), ours.stderr
        assert not (tmp_path / ".ray").exists(), "nothing is written into the user's home"
        foreign.stdin.write("\n")
        foreign.stdin.flush()
        assert foreign.stdout.readline().strip() == "2", "its actor still counts"
    finally:
        foreign.kill()
        foreign.wait()
        subprocess.run(["rm", "-rf", temp], check=False)


DASHBOARD = """
import sys, urllib.error, urllib.request
from pathlib import Path
from cluster.session import connect
from tstar_ray.config import ClusterConfig
from tstar_ray.run import _dashboard
with connect(ClusterConfig(dashboard=True, dashboard_port=int(sys.argv[1])), namespace="seen") as session:
    print(_dashboard(session, Path(sys.argv[2])))
    request = urllib.request.Request(f"{session.dashboard_url}/api/jobs/")
    try:
        urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        print("without", error.code)
    request.add_header("Authorization", "Bearer " + (Path(sys.argv[2]) / "dashboard-token").read_text())
    print("with", urllib.request.urlopen(request, timeout=20).status)
"""


def test_the_dashboard_of_a_private_cluster_asks_for_the_token_in_the_run_folder(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    job = subprocess.run(
        [sys.executable, "-c", DASHBOARD, str(port), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    told, *answers = job.stdout.splitlines()
    file = tmp_path / "dashboard-token"
    assert told == f", dashboard http://127.0.0.1:{port}; the token it asks for is in {file}"
    assert answers == ["without 401", "with 200"], job.stderr
    assert file.stat().st_mode & 0o077 == 0
