"""Supervision on real Ray actors and real signals; the clock is moved by hand."""

import os
import signal
import time
from pathlib import Path

import pytest
import ray
import torch

from cluster.pool import ActorPool, Supervision
from cluster.scale import Desk, ask
from cluster.session import ClusterError, connect
from cluster.weights import ObjectStoreTransport
from tstar_ray.config import ClusterConfig
from tstar_ray.place import here
from tstar_ray.weights import Proof, checksum

pytestmark = pytest.mark.cluster
RULES = Supervision(start_s=30, probe_s=5, probe_failures=3, stall_s=100, max_restarts=3, backoff_s=4)


@pytest.fixture(scope="module")
def session():
    with connect(ClusterConfig(), namespace="pool") as found:
        yield found


class Holder:
    """An actor that takes weights: correctly, with one bit flipped, of another version, never, or by dying."""

    def __init__(self, behaviour, marks):
        self.behaviour, self.marks, self.count = behaviour, Path(marks), 0
        (self.marks / f"{os.getpid()}").touch()

    def ready(self):
        if self.behaviour == "no start":
            raise ValueError("cannot start")
        return here("holder")

    def progress(self):
        return self.count

    def work(self):
        self.count += 1

    def load_weights(self, published):
        flat = ObjectStoreTransport().fetch(published).clone()
        first = len(list(self.marks.iterdir())) == 1
        if first and self.behaviour == "flip":
            flat.view(torch.int32)[7] ^= 1
        if first and self.behaviour == "hang":
            time.sleep(600)
        if first and self.behaviour == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "orphan" and published.version == 1:
            raise ray.exceptions.OwnerDiedError(published.box[0].hex(), b"", "")
        version = published.version - (first and self.behaviour == "old")
        return Proof(version, checksum(flat))


class Bench:
    """A pool with a clock that stands still until it is moved."""

    def __init__(self, folder, *, count=1, behaviour="good", serves_weights=True, cpus=0.0, rules=RULES):
        folder.mkdir(exist_ok=True)
        self.marks, self.now, self.events = folder, 0.0, []
        for method in ("ready", "progress"):
            ray.method(concurrency_group="health")(getattr(Holder, method))
        holder = ray.remote(concurrency_groups={"health": 1})(Holder)
        self.pool = ActorPool(
            "holder",
            lambda index, name: holder.options(name=name, num_cpus=cpus).remote(behaviour, str(folder)),
            count=count,
            supervision=rules,
            serves_weights=serves_weights,
            on_event=self.events.append,
            clock=lambda: self.now,
        )

    def until(self, reached, busy=(), step=0.0, starting=False):
        """Handle answers until ``reached``; the clock moves by ``step`` each time nothing comes, and unless
        ``starting`` stands still while actors start."""
        limit = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < limit, (self.events, self.pool._members)
            refs = self.pool.refs
            done, _ = ray.wait(refs, timeout=0.2) if refs else ([], [])
            for ref in done:
                assert self.pool.take(ref)
            if not done and (starting or not self.pool.starting):
                self.now += step
            self.pool.tick(busy)

    def live(self, count=1):
        return lambda: len(self.pool.handles) == count

    @property
    def pids(self):
        return sorted(int(p.name) for p in self.marks.iterdir())


@pytest.fixture
def bench(session, tmp_path):
    made = []

    def make(**settings):
        made.append(Bench(tmp_path / f"{len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        one.pool.stop()


def published(version, value=0.5):
    return ObjectStoreTransport().publish(torch.full((64,), value), version)


def gone(pid):
    limit = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_no_actor_works_before_it_proved_weights(bench):
    one = bench()
    one.until(lambda: one.pool.proving)
    assert one.pool.handles == {}, "ready, but there are no weights yet"
    one.pool.serve(published(4))
    assert one.pool.handles == {}
    one.until(one.live())
    one.pool.serve(published(5, 0.25))
    assert one.pool.handles == {}, "newer weights have to be proved again"
    assert one.pool.names == {"holder-0"}, "what it works on goes on"
    one.until(one.live())
    assert one.events == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("flip", "serves Proof(version=3, checksum="),
        ("old", "serves Proof(version=2"),
        ("die", "was lost"),
        ("hang", "no proof of its weights in 30 s"),
    ],
)
def test_invariant_8_only_proven_weights_serve(bench, behaviour, reason):
    one = bench(behaviour=behaviour)
    one.pool.serve(published(3))
    one.until(lambda: one.pool.restarts == 1, step=5.0)
    assert "holder-0" not in one.pool.names
    one.until(one.live())
    assert reason in one.events[0]
    assert list(one.pool.handles) == ["holder-0-r1"]
    assert len(one.pids) == 2
    assert all(gone(pid) for pid in one.pids if pid != one.pool.places["holder-0-r1"].pid)


def test_weights_whose_owner_died_cost_no_actor_and_the_next_ones_are_proved(bench):
    one = bench(behaviour="orphan")
    one.pool.serve(published(1))
    one.until(lambda: one.pool.refs and not one.pool.starting)
    asked = one.pool.refs[0]
    one.until(lambda: asked not in one.pool.refs)
    with pytest.raises(ray.exceptions.RayError, match="owner"):
        ray.get(asked)
    assert one.pool.proving
    one.pool.forget_weights()
    one.now += 29
    one.pool.tick()
    one.now += 29
    one.pool.tick()
    assert [m.ref for m in one.pool._members] == [None], "nobody asks for them any more"
    assert one.pool.restarts == 0, "or is late"
    one.pool.serve(published(2))
    one.until(one.live())
    assert list(one.pool.handles) == ["holder-0"]
    assert one.events == []


def test_weights_that_cannot_be_had_end_in_a_loss_within_the_limit(bench):
    one = bench(behaviour="orphan")
    one.until(lambda: one.pool.proving)
    one.pool.serve(published(1))

    def lost():
        one.now += 1.0  # it is asked again and again, and always answers
        return one.pool.restarts == 1

    one.until(lost)
    assert "no proof of its weights in 30 s" in one.events[0]


def test_an_actor_that_starts_meanwhile_proves_the_newest_weights(bench):
    one = bench(count=2)
    one.pool.serve(published(1))
    one.until(one.live(2))
    os.kill(one.pool.places["holder-0"].pid, signal.SIGKILL)
    one.until(lambda: one.pool.restarts == 1, step=6.0)
    newest = published(2, 0.75)
    one.pool.serve(newest)
    one.until(one.live(2))
    again = one.pool.handles["holder-0-r1"].load_weights.remote(newest)
    assert ray.get(again, timeout=60) == newest.proof


def test_a_stopped_actor_is_lost_after_its_probes_stay_unanswered_and_really_ends(bench):
    one = bench(serves_weights=False)
    one.until(one.live())
    victim = one.pool.places["holder-0"].pid
    os.kill(victim, signal.SIGSTOP)
    limit = time.monotonic() + 30
    while Path(f"/proc/{victim}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < limit, "the fault has to happen"
    one.until(lambda: one.pool.restarts == 1, step=1.0)
    assert 15 < one.now <= 25, "three probes of five seconds"
    assert "no answer to a probe in" in one.events[0]
    one.until(one.live())
    assert one.pool.places["holder-0-r1"].pid != victim
    assert gone(victim)


def test_an_actor_that_holds_work_and_does_not_move_on_is_lost(bench):
    one = bench(count=3, serves_weights=False)
    one.until(one.live(3))
    moving = one.pool.handles["holder-1"]

    def later(seconds):
        def reached():
            ray.get(moving.work.remote(), timeout=60)
            return one.now >= seconds or one.pool.restarts

        return reached

    one.until(later(90), busy={"holder-0", "holder-1"}, step=2.0)
    assert one.pool.restarts == 0
    one.until(later(140), busy={"holder-0", "holder-1"}, step=2.0)
    assert one.pool.restarts == 1
    assert "holder-0 was lost (no progress in" in one.events[0], "one moved on, and one had nothing to do"


def test_losses_in_a_row_wait_longer_and_past_the_budget_the_run_ends(bench):
    one = bench(behaviour="no start")
    with pytest.raises(ClusterError, match=r"holder-0-r3 was lost .* the holder actors' 3 restarts an hour are"):
        one.until(lambda: False, step=1.0)
    waits = [e.rpartition("takes its place")[2].strip() for e in one.events]
    assert waits == ["", "in 4 s", "in 8 s"]
    assert "cannot start" in one.events[0]


def test_the_restart_budget_is_for_an_hour(bench):
    one = bench(serves_weights=False)
    for index in range(5):
        one.until(one.live(), step=1.0)
        name = next(iter(one.pool.handles))
        one.pool.lost(name, "as asked")
        one.pool.lost(name, "said twice")
        assert one.pool.restarts == index + 1
        one.now += 1300
    assert [e.partition(";")[0] for e in one.events[:2]] == [
        "holder-0 was lost (as asked)",
        "holder-0-r1 was lost (as asked)",
    ]
    assert all(gone(pid) for pid in one.pids[:-1] if pid != one.pool.places.get("holder-0-r5"))


def test_pools_grow_and_shrink_without_losing_work(bench):
    one = bench(count=2)
    one.pool.serve(published(1))
    one.until(one.live(2))
    one.pool.resize(4)
    one.until(one.live(4))
    assert sorted(one.pool.handles) == ["holder-0", "holder-1", "holder-2", "holder-3"]
    leaving = one.pool.places["holder-3"].pid
    one.pool.resize(1)
    assert list(one.pool.handles) == ["holder-0"], "the others get no more work"
    one.pool.tick({"holder-0", "holder-3"})
    assert one.pool.names == {"holder-0", "holder-3"}, "but end only once they have none"
    assert Path(f"/proc/{leaving}").exists()
    one.pool.tick({"holder-0"})
    assert one.pool.names == {"holder-0"}
    assert gone(leaving)
    one.pool.resize(2)
    one.until(one.live(2))
    assert sorted(one.pool.handles) == ["holder-0", "holder-1-r1"], "a new name for a new actor"
    assert one.pool.restarts == 0, "nothing was lost"


def test_an_actor_the_cluster_has_no_room_for_stays_pending_without_harm(bench):
    one = bench(count=1, cpus=1.5)
    one.pool.serve(published(1))
    one.until(one.live())
    one.pool.resize(2)
    one.until(lambda: one.events, step=5.0, starting=True)
    assert "holder-1 is not ready after 30 s: the cluster has 2 CPU, 0 GPU, free 0.5 CPU" in one.events[0]
    one.until(lambda: one.now > 300, step=5.0, starting=True)
    assert list(one.pool.handles) == ["holder-0"]
    assert len(one.events) == 1, "said once"
    one.pool.lost("holder-0", "makes room")
    one.until(lambda: "holder-1" in one.pool.handles)


def test_a_pool_without_any_actor_that_works_is_an_error_in_bounded_time(bench):
    one = bench(count=1, cpus=64)
    with pytest.raises(ClusterError, match="no holder actor is ready after 30 s: the cluster has 2 CPU"):
        one.until(lambda: False, step=5.0, starting=True)


def test_a_request_for_more_actors_that_makes_no_sense_is_named_once_and_ignored(bench, tmp_path):
    one, told = bench(serves_weights=False), []
    desk = Desk(tmp_path, {"rollout": one.pool}, dict, told.append)
    for request, why in {
        '{"rollouts": 3}': "'rollouts' is none of rollout, reward",
        '{"rollout": 0}': "rollout = 0, but it takes a whole number of actors, at least 1",
        '{"rollout": "4"}': "rollout = '4', but",
        "[4]": "it holds [4] instead of",
        '{"rollout": ': "Expecting value",
    }.items():
        (tmp_path / "scale.json").write_text(request)
        desk.tick()
        desk.tick()
        [text] = told
        assert f"{tmp_path / 'scale.json'} is ignored: " in text
        assert why in text
        assert text.endswith("ask again by python -m cluster.scale, or delete the file")
        assert one.pool.count == 1
        told.clear()
    ask(tmp_path, {"rollout": 2})
    desk.tick()
    assert told == ["1 rollout actors wanted so far, now 2"]
    assert one.pool.count == 2
