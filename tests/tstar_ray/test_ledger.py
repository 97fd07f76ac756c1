"""Accounting: every dispatched group ends exactly once."""

import random

import pytest

from tstar_ray.ledger import OUTCOMES, Ledger


def test_invariant_6_every_group_ends_exactly_once():
    rng, ledger, open_groups = random.Random(0), Ledger(), []
    for _ in range(2_000):
        if open_groups and rng.random() < 0.5:
            group = open_groups.pop(rng.randrange(len(open_groups)))
            ledger.end(group, rng.choice(OUTCOMES))
            with pytest.raises(AssertionError, match=f"group {group} ended"):
                ledger.end(group, "trained")
        else:
            open_groups.append(ledger.dispatch())
        ledger.check()
        assert ledger.depth == len(open_groups)
    saved = ledger.state_dict()
    assert sum(saved["ended"].values()) == saved["dispatched"], "what is open does not outlive the process"
    assert saved["ended"]["cancelled"] == ledger.ended["cancelled"] + len(open_groups)
    for group in open_groups:
        ledger.end(group, "cancelled")
    assert ledger.state_dict() == saved
    assert sum(ledger.ended.values()) == ledger.dispatched


def test_a_group_that_was_never_dispatched_cannot_end():
    with pytest.raises(AssertionError, match="group 7 ended as trained, but it is not open"):
        Ledger().end(7, "trained")


def test_ids_go_on_after_a_resume():
    ledger = Ledger()
    for _ in range(5):
        ledger.end(ledger.dispatch(), "filtered")
    resumed = Ledger()
    resumed.load_state_dict(ledger.state_dict())
    assert resumed.dispatch() == 5
    assert resumed.ended["filtered"] == 5
