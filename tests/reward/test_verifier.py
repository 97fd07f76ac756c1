"""The verifier pool with real processes: poison, kills, hangs, floods, and the death of its parent."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reward.grading import Verdict
from reward.verifier import Limits, VerifierPool

POISON = [
    "9^{9^{9^{9}}}",
    r"\sum_{n=1}^{10^9}1/n^2",
    r"\prod_{k=1}^{10^7}\sin k",
    "7^{200000000}",
    r"\sqrt{10^{4000000}+1}",
    "30000000!",
    "3^{3^{19}}",
    r"\binom{100000000}{50000000}",
    "(" * 400 + "1" + ")" * 400,
    "+".join(f"x^{i}" for i in range(400)),
    r"\boxed{" * 500,
    "1." + "3" * 100_000,
    "x+" * 20_000,
    r"\int_0^1 x^x \sin(x^{x}) dx",
]


@pytest.fixture
def grader(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "bad_graders:obey"


def verdicts(results):
    return [result.verdict.value for result in results]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("text", "verdict", "replaced"),
    [
        ("hang", "timeout", "timeout"),
        ("deaf", "timeout", "timeout"),
        ("spin", "timeout", "timeout"),
        ("kill", "crashed", "died"),
        ("segfault", "crashed", "died"),
        ("grow", "crashed", "memory"),
        ("leap", "crashed", ""),
        ("exit", "crashed", ""),
        ("raise", "crashed", ""),
        ("nonsense", "crashed", ""),
        ("noise", "wrong", ""),
    ],
)
def test_a_fault_ends_its_own_item_only(grader, text, verdict, replaced):
    with VerifierPool(1, grader=grader, limits=Limits(deadline_s=1.0, memory_mb=128)) as pool:
        pool.verify([("1", "1")])
        before = pool.pids
        start = time.monotonic()
        found = pool.verify([("1", "1"), ("2", "1"), (text, "1"), ("1", "1"), ("2", "1")])
        assert verdicts(found) == ["correct", "wrong", verdict, "correct", "wrong"]
        assert time.monotonic() - start < 20
        assert {reason: n for reason, n in pool.respawns.items() if n} == ({replaced: 1} if replaced else {})
        assert (pool.pids != before) == bool(replaced), "the worker was replaced"
        assert gone(before[0]) == bool(replaced), "and the old one ended"


def test_a_grader_that_cannot_be_imported_breaks_the_pool_instead_of_waiting(grader):
    with VerifierPool(2, grader="no_grader:grade") as pool:
        for _ in range(2):  # asked before it broke, and after
            with pytest.raises(RuntimeError, match="workers for 'no_grader:grade' do not start"):
                pool.verify([("1", "1")])


def test_workers_killed_while_idle_are_replaced_however_many_they_are(grader):
    with VerifierPool(2, grader=grader) as pool:
        pool.verify([("1", "1")] * 2)
        for count in range(1, 8):
            deadline = time.monotonic() + 20
            while not all(worker.warm for worker in list(pool._workers)) and time.monotonic() < deadline:
                time.sleep(0.01)
            victim = pool.pids[0]
            os.kill(victim, signal.SIGKILL)
            while victim in pool.pids and time.monotonic() < deadline:
                time.sleep(0.01)
            assert pool.respawns["died"] == count
        assert verdicts(pool.verify([("1", "1")])) == ["correct"]


def test_a_worker_that_goes_on_after_its_item_runs_into_the_kernels_limit(grader):
    limits = Limits(deadline_s=5, start_s=5)
    with VerifierPool(1, grader=grader, limits=limits) as pool:
        pool.verify([("1", "1")] * 3)
        [victim] = pool.pids
        soft, _ = resource.prlimit(victim, resource.RLIMIT_CPU)
        assert 20 < soft < 25, "four cores until the deadline, and what it has used so far"
        assert verdicts(pool.verify([("linger", "linger")])) == ["correct"]
        time.sleep(0.5)  # it renews its limit before it waits for the next
        resource.prlimit(victim, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
        deadline = time.monotonic() + 20
        while not pool.respawns["died"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert gone(victim)
        assert verdicts(pool.verify([("1", "1")])) == ["correct"]


def test_a_call_is_rejected_whole_while_too_many_items_of_others_wait(grader):
    with VerifierPool(1, grader=grader, limits=Limits(max_waiting=4)) as pool:
        large = pool.submit([("pause 0.3", "0.3")] * 8)
        refused = pool.verify([("1", "1")] * 2)
        assert verdicts(refused) == ["rejected"] * 2
        assert refused[0].detail.endswith("items waiting")
        assert verdicts(large.result(timeout=30)) == ["correct"] * 8, "an idle pool takes a call of any size"
        assert verdicts(pool.verify([("1", "1")])) == ["correct"]


def test_the_poison_corpus_ends_in_typed_verdicts_in_bounded_time_and_the_pool_still_grades():
    items = [(f"so \\boxed{{{answer}}}", "2") for answer in POISON]
    deadline = 1.5
    with VerifierPool(2, limits=Limits(deadline_s=deadline)) as pool:
        pool.verify([(r"\boxed{\frac{1}{2}}", r"\frac{2}{4}")])  # math-verify is imported
        start = time.monotonic()
        found = pool.verify(items)
        assert time.monotonic() - start < len(items) * (deadline + 3)
        assert Verdict.correct not in [r.verdict for r in found]
        assert Verdict.timeout in [r.verdict for r in found], "some of it must really hang"
        after = pool.verify([(r"\boxed{\sqrt{8}}", r"2\sqrt{2}"), (r"\boxed{3}", "2")])
        assert verdicts(after) == ["correct", "wrong"]


def test_a_long_queue_never_times_out(grader):
    """Sixty items of 0.05 s behind one worker with a deadline of 0.5 s: the last waits for three seconds."""
    with VerifierPool(1, grader=grader, limits=Limits(deadline_s=0.5)) as pool:
        assert verdicts(pool.verify([("pause 0.05", "0.05")] * 60)) == ["correct"] * 60
        assert pool.respawns["timeout"] == 0


def test_a_flood_of_equal_but_not_identical_answers_has_no_false_zero():
    items = [(f"\\boxed{{\\frac{{{n}}}{{2}}\\sqrt{{2}}}}", f"\\frac{{{n}}}{{\\sqrt{{2}}}}") for n in range(1, 200, 2)]
    with VerifierPool(1, limits=Limits(deadline_s=5.0)) as pool:
        assert set(verdicts(pool.verify(items * 3))) == {"correct"}


def test_a_killed_worker_is_replaced_and_only_its_item_is_lost(grader):
    with VerifierPool(1, grader=grader, limits=Limits(deadline_s=30.0)) as pool:
        pool.verify([("1", "1")])
        victim = pool.pids[0]
        timer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        timer.start()
        found = pool.verify([("pause 0.05", "0.05")] * 40)
        timer.join()
        assert gone(victim), "the fault really happened"
        assert pool.respawns["died"] == 1, "and the recovery ran"
        assert sorted(set(verdicts(found))) == ["correct", "crashed"]
        assert verdicts(found).count("crashed") == 1


def test_long_inputs_are_rejected_without_being_tried(grader):
    with VerifierPool(1, grader=grader, limits=Limits(max_chars=10)) as pool:
        assert verdicts(pool.verify([("x" * 20, "1"), ("1", "1")])) == ["rejected", "correct"]


def test_workers_are_recycled_by_count(grader):
    with VerifierPool(1, grader=grader, limits=Limits(max_items=5)) as pool:
        assert verdicts(pool.verify([("1", "1")] * 23)) == ["correct"] * 23
        assert pool.respawns["recycled"] >= 3


def test_workers_that_have_grown_are_recycled_between_items(grader):
    with VerifierPool(1, grader=grader, limits=Limits(max_rss_mb=60)) as pool:
        pool.verify([("1", "1")])
        before = pool.pids
        assert verdicts(pool.verify([("keep 80", "80"), ("1", "1")])) == ["correct"] * 2
        deadline = time.monotonic() + 20
        while pool.pids in (before, []) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pool.pids != before
        assert pool.respawns["recycled"] == 1


def test_workers_end_with_their_parent_even_in_mid_item(grader):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from reward.verifier import *
pool = VerifierPool(2, grader={grader!r})
pool.verify([("1", "1")])
print(*pool.pids, flush=True)
pool.verify([("deaf", "1"), ("spin", "1")])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("field", ["deadline_s", "memory_mb", "max_chars"])
def test_impossible_limits_are_named(field):
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        Limits(**{field: 0})
