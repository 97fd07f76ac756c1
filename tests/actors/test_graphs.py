"""Passes of fixed shapes: what they decode is what other passes decode, whatever fills them up. On CPU nothing is
recorded, but shapes, plans and filling are those of a GPU; benchmarks/checks.py records and replays them on one."""

from dataclasses import replace

import numpy as np
import pytest
from engines import DYNAMIC, NO_STOP, assert_equal
from reference import Changing, plain_twin
from synthetic import make_model, make_requests

import actors.graphs
from actors.graphs import Shape, plan
from actors.kv_cache import Rows
from actors.torch_engine import TorchEngine
from tstar_ray.trajectory import Request
from tstar_ray.weights import flatten

LONG = replace(NO_STOP, max_new_tokens=60)


def rows_of(start, end, block, source=None):
    start, end = np.array(start), np.array(end)
    n = len(start)
    source = np.full(n, -1) if source is None else np.array(source)
    return Rows(slot=np.arange(n), start=start, end=end, block_size=np.full(n, block), source=source)


def test_a_plan_repeats_the_first_token_and_fills_rows_that_see_one_position():
    """Two rows of B=2: one commits its last block, the other denoises only."""
    rows = rows_of([4, 2], [8, 4], 2)
    found = plan(rows, Shape(rows=3, queries=4, tokens=8, keys=16, even=False))
    slot, position, place = found[:24].reshape(3, 8)
    assert slot.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert position.tolist() == [4, 5, 6, 7, 2, 3, 4, 4]
    assert place.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert found[24:].reshape(3, 4).tolist() == [[6, 6, 8, 8], [4, 4, 1, 1], [1, 1, 1, 1]]


def test_a_plan_of_even_rows_is_filled_with_slots_that_nobody_uses():
    found = plan(rows_of([4, 2], [6, 4], 2), Shape(rows=3, queries=2, tokens=6, keys=16, even=True))
    slot, position, place = found[:18].reshape(3, 6)
    assert slot.tolist() == [0, 0, 1, 1, 2, 2]
    assert position.tolist() == [4, 5, 2, 3, 0, 1]
    assert place.tolist() == list(range(6))
    assert found[18:].reshape(3, 2).tolist() == [[6, 6], [4, 4], [1, 1]]


def test_shapes_are_rounded_up_within_the_cache():
    engine = TorchEngine(make_model(seed=2), cuda_graphs=True)
    engine._resize(20, 208)
    shape = engine._graphs.shape
    assert shape(rows_of([8] * 9, [16] * 9, 4)) == Shape(rows=16, queries=8, tokens=128, keys=64, even=True)
    uneven = rows_of([200] * 18 + [192], [208] * 19, 8)
    assert shape(uneven) == Shape(rows=20, queries=16, tokens=192, keys=208, even=False)
    assert shape(rows_of([0], [12], 4)) is None, "reads a prompt"
    assert shape(rows_of([8, 8], [12, 12], 4, source=[-1, 0])) is None, "copies keys"


@pytest.mark.parametrize("max_batch", [3, 128])
def test_invariant_1_graphs_decode_what_is_decoded_without(model, twin, max_batch):
    """Block sizes mixed in one pass, sequences that come and end; shared prompts."""
    engine = TorchEngine(model, max_batch=max_batch, cuda_graphs=True)
    rules = [DYNAMIC, replace(NO_STOP, block_size=8, temperature=0.0), replace(DYNAMIC, block_size=2, temperature=0.7)]
    prompts = make_requests([5, 18, 9, 33])
    asked = [
        ([Request(i, k, r.prompt_ids, seed=10 * i + k) for i, r in enumerate(prompts) for k in range(2)], rule)
        for rule in rules
    ]
    streams = [engine.stream(requests, rule) for requests, rule in asked]
    for (requests, rule), stream in zip(asked, [list(stream) for stream in streams]):
        assert len(stream) == len(requests)
        for trajectory in stream:
            (request,) = [r for r in requests if (r.group_id, r.sample) == (trajectory.group_id, trajectory.sample)]
            assert_equal(trajectory, request, twin, model, rule)
    assert engine.stats.graphed > engine.stats.forwards / 4
    assert engine.stats.graphed < engine.stats.forwards, "passes that read prompts are none of them"


def test_slots_that_filled_a_pass_up_are_given_to_sequences_that_come_later(model, twin):
    rule = replace(LONG, strategy="static", denoising_steps=2)
    engine, ran = TorchEngine(model, max_batch=8, cuda_graphs=True), []
    run = engine._graphs._run
    engine._graphs._run = lambda shape, at: (ran.append(shape), run(shape, at))[1]
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests([8, 8, 12, 30, 5]), (28, 60, 60, 44, 60))]
    first = engine.stream(requests[:3], rule)
    found = [next(first)]
    even = [shape for shape in ran if shape.even]
    assert even
    assert min(shape.rows for shape in even) == 8, "of which three were sequences"
    found += [*engine.stream(requests[3:], rule), *first]
    assert len(found) == 5
    for trajectory in found:
        assert_equal(trajectory, requests[trajectory.group_id], twin, model, rule)


def watch_admissions(engine, monkeypatch):
    """How many sequences come together, as a list that grows."""
    sizes, admit = [], engine._slots.admit
    monkeypatch.setattr(engine._slots, "admit", lambda work: (sizes.append(len(work)), admit(work)))
    return sizes


def test_what_comes_while_slots_are_free_is_admitted_at_once(model, monkeypatch):
    engine = TorchEngine(model, max_batch=32, cuda_graphs=True)
    admitted = watch_admissions(engine, monkeypatch)
    first = engine.stream([replace(r, max_new_tokens=n) for r, n in zip(make_requests([5, 9]), (8, 60))], LONG)
    next(first)
    assert next(engine.stream([replace(make_requests([7])[0], max_new_tokens=4)], LONG)).group_id == 0
    assert admitted == [2, 1]
    assert engine._slots.active == 1, "the one that was there before has not ended"


def test_prompts_are_read_together_so_that_most_passes_are_replayed(model, twin, monkeypatch):
    """Sequences of 32 slots that end one by one; with graphs two slots are given away at a time."""
    requests = [replace(r, max_new_tokens=4 + 2 * (i % 29)) for i, r in enumerate(make_requests([7, 12, 9, 5] * 24))]
    rule, shares, sizes = LONG, {}, {}
    for graphs in (False, True):
        engine = TorchEngine(model, max_batch=32, cuda_graphs=graphs)
        admitted = watch_admissions(engine, monkeypatch)
        for trajectory in engine.stream(requests, rule):
            if trajectory.group_id % 12 == 0:
                assert_equal(trajectory, requests[trajectory.group_id], twin, model, rule)
        shares[graphs], sizes[graphs] = len(admitted) / engine.stats.forwards, admitted
    assert min(sizes[False]) == 1
    assert min(sizes[True][:-1]) == 2, "the last one waits for nobody"
    assert sum(sizes[True]) == sum(sizes[False]) == len(requests)
    assert shares[True] < shares[False]


def test_a_longer_request_moves_the_cache_and_recordings_are_made_anew(model, twin):
    engine = TorchEngine(model, max_batch=4, cuda_graphs=True)
    rule = replace(NO_STOP, max_new_tokens=120)
    short = [replace(r, max_new_tokens=24) for r in make_requests([9, 12, 7])]
    list(engine.stream(short, rule))
    first = engine._graphs.shapes
    assert first
    requests = make_requests([70, 5])
    for trajectory in engine.stream(requests, rule):
        assert_equal(trajectory, requests[trajectory.group_id], twin, model, rule)
    assert max(shape.keys for shape in engine._graphs.shapes) > max(shape.keys for shape in first)
    for trajectory in engine.stream(short, rule):
        assert_equal(trajectory, short[trajectory.group_id], twin, model, rule)
    engine.sleep()
    assert engine._graphs.shapes == []


def test_trap_31_weights_in_flight_reach_the_recordings():
    start, other = make_model(seed=2), make_model(seed=8)
    engine = TorchEngine(make_model(seed=2), cuda_graphs=True)
    requests = [replace(r, max_new_tokens=cap) for r, cap in zip(make_requests([5, 18, 9]), (8, 40, 60), strict=True)]
    rule = replace(NO_STOP, max_new_tokens=60)
    stream = engine.stream(requests, rule)
    found, switch, before = [next(stream)], engine.stats.forwards, engine.stats.graphed
    assert before > 0
    engine.load_weights(flatten(other), 1)
    found += stream
    assert engine.stats.graphed > before
    for trajectory in found:
        twin = Changing(plain_twin(start), plain_twin(other), switch=switch)
        assert_equal(trajectory, requests[trajectory.group_id], twin, start, rule)
    assert any(len(set(t.weight_versions)) == 2 for t in found)


def test_the_shape_not_needed_for_longest_makes_room(model, twin, monkeypatch):
    monkeypatch.setattr(actors.graphs, "RECORDED_AT_MOST", 2)
    engine = TorchEngine(model, cuda_graphs=True)
    requests, rule = make_requests([5, 100, 30]), replace(NO_STOP, max_new_tokens=150)
    for trajectory in engine.stream(requests, rule):
        assert_equal(trajectory, requests[trajectory.group_id], twin, model, rule)
        assert len(engine._graphs.shapes) <= 2
    assert max(shape.keys for shape in engine._graphs.shapes) >= 256, "the newest ones are there"
