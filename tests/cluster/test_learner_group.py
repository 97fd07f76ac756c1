"""The learner's ranks on a real private Ray: room for them, slow starts, silence, death between calls."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from benchmarks.simulated_actors import SimulatedRank, Times
from cluster.session import connect
from cluster.weights import ObjectStoreTransport
from learner.group import LearnerError, LearnerGroup, LearnerLostError, LearnerRank
from tstar_ray.config import ClusterConfig, LearnerConfig

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def session():
    with connect(ClusterConfig(), namespace="test") as found:
        yield found


class SlowRank(SimulatedRank):
    """Its process takes longer to start than a rank may be silent."""

    def __init__(self, *arguments, **more):
        time.sleep(4)
        super().__init__(*arguments, **more)


class UnreadableError(Exception):
    """Cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(first)


class FailingRank(SimulatedRank):
    """Its update fails in a way that the driver cannot read."""

    def _update(self, groups, spec, *, update):
        raise UnreadableError("one", "two")


def test_the_port_of_the_rendezvous_is_held_until_it_begins(session):
    rank = LearnerRank(0, None, None, threads=1, seed=0, weights=None)
    _, port = rank.address()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    rank._port.close()


class Guest:
    """Takes room."""

    def arrived(self):
        pass


@pytest.fixture
def learner(session):
    made = []

    def make(rank_class=SimulatedRank, cpus=0.0, **times):
        made.append(
            LearnerGroup(
                Times(update_s=60, **times),
                LearnerConfig(silent_s=1.5),
                options={"num_cpus": cpus},
                threads=1,
                seed=0,
                weights=ObjectStoreTransport(),
                rank_class=rank_class,
            )
        )
        return made[-1]

    yield make
    for group in made:
        group.stop()


@pytest.mark.parametrize("rank_class", [SimulatedRank, SlowRank])
def test_a_learner_that_takes_long_to_start_is_not_lost_and_one_that_falls_silent_is(learner, rank_class):
    group = learner(rank_class)
    group.restart(60)
    [place] = group.places.values()
    group.check()
    os.kill(place.pid, signal.SIGSTOP)
    time.sleep(2)
    group.check()  # its driver was stopped as well, for all it can know
    with pytest.raises(LearnerLostError, match=r"rank 0 gave no sign of life in \d s during update"):
        group.update([], None, update=0)


def test_a_rank_that_dies_between_calls_is_noticed_and_an_error_nobody_can_read_is_the_updates(learner):
    group = learner(FailingRank)
    group.restart(60)
    with pytest.raises(LearnerError, match="update failed: Failed to deserialize") as raised:
        group.update([], None, update=0)
    assert not isinstance(raised.value, LearnerLostError)
    [place] = group.places.values()
    os.kill(place.pid, signal.SIGKILL)
    with pytest.raises(LearnerLostError, match="rank 0 was lost during the wait for others"):
        check_until(group, time.monotonic() + 30)


def check_until(group, deadline):
    while time.monotonic() < deadline:
        group.check()
        time.sleep(0.1)


def test_invariant_12_a_learner_without_room_says_what_is_missing_and_one_built_anew_waits_for_it(learner):
    taken = ray.remote(num_cpus=1.5)(Guest).remote()
    ray.get(taken.arrived.remote(), timeout=60)
    group = learner(cpus=1.0)
    asked = r"with 1 CPU, 0 GPU each \(learner.cpus.*\), the cluster has 2 CPU, 0 GPU, free 0.* CPU.*; add nodes"
    with pytest.raises(LearnerError, match=f"not placed after 1 s.*{asked}.*cluster.start_timeout_s"):
        group.start(1.0)
    told = []

    def hear(text):
        told.append(text)
        if len(told) == 2:
            ray.kill(taken)  # a node joins

    group.on_event = hear
    group.restart(2.0)
    assert group.places.keys() == {"learner-0"}
    assert re.search(f"{asked}.*waiting on, at most 60 minutes", told[1])


PACKED = """
from benchmarks.simulated_actors import SimulatedRank, Times
from benchmarks.simulated_cluster import Nodes
from cluster.session import connect
from cluster.weights import ObjectStoreTransport
from learner.group import LearnerGroup
from tstar_ray.config import ClusterConfig, LearnerConfig

with Nodes(head_cpus=2) as cluster:
    nodes = [cluster.add(cpus=4) for _ in range(2)]
    with connect(ClusterConfig(address=cluster.address), namespace="packed"):
        group = LearnerGroup(
            Times(), LearnerConfig(ranks=3), options={"num_cpus": 1.0}, threads=1, seed=0,
            weights=ObjectStoreTransport(), rank_class=SimulatedRank,
        )
        for _ in range(2):
            group.restart(60)
            pids = {place.pid for place in group.places.values()}
            print("on one node:", len(pids) == 3 and any(pids <= cluster.workers(node) for node in nodes))
        group.stop()
"""


def test_ranks_share_a_node_where_they_fit():
    """Three nodes have room for one of three; two could take all."""
    done = subprocess.run(
        [sys.executable, "-c", PACKED],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    )
    assert done.stdout.count("on one node: True") == 2, done.stdout + done.stderr
