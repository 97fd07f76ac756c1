"""Calls that fail: real engines and verifiers that break while their actors live, requests that nobody can decode."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.rollout import RolloutWorker
from actors.rollout import remote_class as rollout_class
from benchmarks.simulated_actors import SimulatedRollout, Times
from cluster.pool import ActorPool, Supervision
from cluster.session import connect
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
from tstar_ray.weights import flatten

pytestmark = pytest.mark.cluster
RULES = Supervision(start_s=60, probe_s=1, probe_failures=10, stall_s=60, max_restarts=4, backoff_s=0.1)
LIMITS = Limits(rollout_s=120, reward_s=5, start_s=60, max_attempts=2)
DECODING = Decoding(block_size=4, max_new_tokens=32, stop_ids=(0,))
GRADER = '''
import time
from pathlib import Path
from reward.grading import Verdict

if Path(__file__).with_name("broken").exists():
    raise ImportError("its disk is full")

def grade(text, answer):
    """Takes as long as the answer says."""
    time.sleep(float(answer))
    return Verdict.wrong
'''


class TwoArgumentsError(Exception):
    """Cannot be unpickled, like some errors of CUDA libraries."""

    def __init__(self, first, second):
        super().__init__(first)


class BreakingRollout(RolloutWorker):
    """A real engine that fails at everything from a moment on, as after a sticky CUDA error."""

    broken = False

    def break_for_ever(self):
        self.broken = True

    def generate(self, requests, decoding, version):
        if self.broken:
            raise TwoArgumentsError("CUDA error", "device-side assert triggered")
        return super().generate(requests, decoding, version)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A collector with two real rollout actors and a reward actor, its events, and the folder of its grader."""
    folder = tmp_path_factory.mktemp("grader")
    (folder / "slow_grader.py").write_text(GRADER)
    events = []
    with connect(ClusterConfig(), namespace="collector"):
        rollout_class()  # says which methods have threads of their own
        rollout = ray.remote(max_concurrency=8, concurrency_groups={"weights": 1, "health": 1})(BreakingRollout)

        def make_rollout(index, name):
            return rollout.options(name=name, num_cpus=0).remote(
                index, ModelConfig(), ActorsConfig(max_batch=8), threads=1, weights=ObjectStoreTransport()
            )

        def make_reward(index, name):
            environment = {"env_vars": {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}}
            return (
                reward_class()
                .options(name=name, num_cpus=0, runtime_env=environment)
                .remote(index, workers=1, deadline_s=5.0, grader="slow_grader:grade")
            )

        common = {"supervision": RULES, "on_event": events.append}
        rollouts = ActorPool("rollout", make_rollout, count=2, serves_weights=True, **common)
        rewards = ActorPool("reward", make_reward, count=1, serves_weights=False, **common)
        collector = Collector(rollouts, rewards, LIMITS, seed=1, score_truncated=False, on_event=events.append)
        collector.serve(ObjectStoreTransport().publish(flatten(load_checkpoint("embedded").model), 0))
        yield collector, events, folder
        rollouts.stop()
        rewards.stop()


def ask(count, seconds="0", first=0):
    """Problems whose answers take a verifier so long."""
    question = "Mia has 12 pens. Mia buys 5. How many pens?"
    ids = tuple(inspect_checkpoint("embedded")[0](question)["input_ids"])
    return {first + i: PromptedProblem(Problem(str(i), question, seconds), ids) for i in range(count)}


def test_a_question_that_cannot_be_decoded_fails_alone(parts):
    """One prompt holds the mask token, which the engine refuses together with the whole unit."""
    collector, _, _ = parts
    problems = ask(6)
    mask = inspect_checkpoint("embedded")[0].mask_token_id
    problems[3] = replace(problems[3], prompt_ids=(*problems[3].prompt_ids, mask))
    found = collector.finish(collector.dispatch(problems, DECODING, group_size=2))
    assert found.failed == [3]
    assert [g.group_id for g in found.groups] == [0, 1, 2, 4, 5]
    assert found.retries == 2, "only its own samples were tried again, each alone"
    assert collector.rollouts.restarts == 0, "which is no fault of an actor"


def test_an_actor_whose_engine_fails_at_everything_is_replaced(parts):
    collector, events, _ = parts
    name, victim = next(iter(collector.rollouts.handles.items()))
    ray.get(victim.break_for_ever.remote(), timeout=30)
    for first in range(10, 90, 10):
        found = collector.finish(collector.dispatch(ask(6, first=first), DECODING, group_size=2))
        assert len(found.groups) == 6, "the other actor decodes what it fails at"
        if collector.rollouts.restarts:
            break
    assert collector.rollouts.restarts == 1
    assert name not in collector.rollouts.names
    [told] = [e for e in events if f"{name} was lost" in e]
    assert re.search(r"failed on [3-5] units in a row, the last time: .*deserialize", told)


def test_a_reward_actor_whose_verifiers_cannot_start_is_replaced(parts):
    collector, events, folder = parts
    [(name, actor)] = collector.rewards.handles.items()
    (folder / "broken").touch()
    for pid in ray.get(actor.pids.remote(), timeout=30):
        os.kill(pid, signal.SIGKILL)
    batch = collector.dispatch(ask(2, first=100), DECODING, group_size=2)
    while not collector.rewards.restarts:
        collector.wait([ray.remote(lambda: time.sleep(0.2)).options(num_cpus=0).remote()], timeout=30)
    (folder / "broken").unlink()
    assert [g.group_id for g in collector.finish(batch).groups] == [100, 101]
    assert any(f"{name} was lost (workers for 'slow_grader:grade' do not start" in e for e in events)


def test_verifications_are_not_late_for_waiting_behind_others_or_for_a_driver_that_was_stopped(parts):
    """128 of them one after the other take longer than the limit of 32; then the driver looks away for seconds."""
    rollout = ray.remote(num_cpus=0, max_concurrency=8)(SimulatedRollout)
    times = Times(token_s=0.0, median_tokens=4, sigma=0.0, load_s=0.0)
    rollouts = ActorPool(
        "simulated",
        lambda index, name: rollout.options(name=name).remote(index, times),
        count=1,
        supervision=RULES,
        serves_weights=True,
        on_event=print,
    )
    limits = replace(LIMITS, reward_s=0.08, start_s=0.5)
    rewards = parts[0].rewards
    slow, before = Collector(rollouts, rewards, limits, seed=1, score_truncated=True, on_event=print), rewards.restarts
    try:
        slow.serve(ObjectStoreTransport().publish(torch.zeros(8), 0))
        found = slow.finish(slow.dispatch(ask(16, "0.04", first=200), DECODING, group_size=8))
        assert found.reward_s > 4, "longer than a chunk may take"
        assert found.verdicts == {"wrong": 128}
        assert rewards.restarts == before
        batch = slow.dispatch(ask(4, "0.15", first=300), DECODING, group_size=8)
        while not slow._scoring:
            slow._pump()
        time.sleep(3)
        assert slow.finish(batch).reward_s > 4
        assert rewards.restarts == before
    finally:
        rollouts.stop()
