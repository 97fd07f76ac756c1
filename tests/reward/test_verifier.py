"""The verifier pool with real processes: poison, kills, hangs, floods, and the death of its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reward.grading import Verdict
from reward.verifier import Limits, VerifierPool

GRADERS = '''
import os, signal, time
from reward.grading import Verdict

def grade(text, answer):
    """What the text says."""
    if text == "hang":
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(1)
    if text == "spin":
        return 9 ** 9 ** 9 ** 9
    if text == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "raise":
        raise RuntimeError("no idea")
    if text == "base":
        raise BaseException("not an Exception")
    if text == "memory":
        bytearray(20 << 30)
    if text.startswith("slow"):
        time.sleep(0.05)
    return Verdict.correct if text.endswith(answer) else Verdict.wrong
'''

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
def grader(tmp_path, monkeypatch):
    (tmp_path / "odd_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "odd_graders:grade"


def verdicts(results):
    return [result.verdict.value for result in results]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("hang", "timeout"),
        ("spin", "timeout"),
        ("die", "crashed"),
        ("raise", "crashed"),
        ("base", "crashed"),
        ("memory", "crashed"),
    ],
)
def test_a_fault_ends_its_own_item_only(grader, text, verdict):
    with VerifierPool(1, grader=grader, limits=Limits(deadline_s=1.0)) as pool:
        pool.verify([("1", "1")])
        before = pool.pids
        start = time.monotonic()
        found = pool.verify([("1", "1"), ("2", "1"), (text, "1"), ("1", "1"), ("2", "1")])
        assert verdicts(found) == ["correct", "wrong", verdict, "correct", "wrong"]
        assert time.monotonic() - start < 20
        if text in ("hang", "spin", "die"):
            assert pool.pids != before, "the worker was replaced"
            assert gone(before[0]), "and the old one ended"
        assert pool.counts[Verdict(verdict)] == 1


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
        assert verdicts(pool.verify([("slow 1", "1")] * 60)) == ["correct"] * 60
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
        found = pool.verify([("slow 1", "1")] * 40)
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


def test_workers_end_with_their_parent_even_in_mid_item(tmp_path, grader):
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from reward.verifier import *
pool = VerifierPool(2, grader="odd_graders:grade")
pool.verify([("1", "1")])
print(*pool.pids, flush=True)
pool.verify([("hang", "1"), ("spin", "1")])
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
