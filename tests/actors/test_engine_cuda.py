"""The engine's CUDA branches on a pretended GPU (tests/pretend_cuda.py): devices, waits, recorded graphs.

What only a GPU can say is left to benchmarks/gpu.sh: its speed, its rounding and its own kernels.
"""

from dataclasses import replace

import pytest
import torch
from engines import NO_STOP, RULES, assert_equal
from pretend_cuda import CUDA, PretendCuda
from reference import Changing, plain_twin
from synthetic import make_model, make_requests

import actors.graphs
from actors.torch_engine import TorchEngine
from benchmarks import checks
from tstar_ray.trajectory import Request
from tstar_ray.weights import flatten

LONG = replace(NO_STOP, max_new_tokens=60)


def on_gpu(**settings):
    """An engine with the weights of the fixture ``model``."""
    return TorchEngine(make_model(seed=2).to(CUDA), **settings)


@pytest.mark.parametrize("graphs", [False, True])
def test_invariant_1_all_rules_decode_together_and_the_host_waits_once_a_round(model, twin, graphs):
    prompts, endings = make_requests([5, 18, 9]), []
    asked = [
        ([Request(i, k, r.prompt_ids, seed=10 * i + k) for i, r in enumerate(prompts) for k in range(2)], rule)
        for rule in RULES
    ]
    with PretendCuda() as cuda:
        engine = on_gpu(cuda_graphs=graphs, max_batch=9)
        finish, engine._finish = engine._finish, lambda ended: (endings.append(ended.sum()), finish(ended))[1]
        streams = [engine.stream(requests, rule) for requests, rule in asked]
        cuda.waits.clear()
        found = [list(stream) for stream in streams]
    assert cuda.waits == {"copy to the host": engine.stats.forwards + len(endings)}
    assert sum(endings) == engine.stats.sequences == 6 * len(RULES)
    assert (engine.stats.graphed > engine.stats.forwards / 4) is graphs
    assert sum(graph.replays for graph in cuda.graphs) == engine.stats.graphed
    for (requests, rule), trajectories in zip(asked, found, strict=True):
        for trajectory in trajectories:
            [request] = [r for r in requests if (r.group_id, r.sample) == (trajectory.group_id, trajectory.sample)]
            assert_equal(trajectory, request, twin, model, rule)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_trap_31_weights_in_flight_reach_what_was_recorded_before(policy):
    start, other = make_model(seed=2), make_model(seed=8)
    requests = [replace(r, max_new_tokens=cap) for r, cap in zip(make_requests([5, 18, 9]), (8, 40, 60), strict=True)]
    with PretendCuda() as cuda:
        engine = on_gpu(cuda_graphs=True, cache_update=policy)
        stream = engine.stream(requests, LONG)
        found, switch = [next(stream)], engine.stats.forwards
        before = {graph: graph.replays for graph in cuda.graphs}
        assert before
        proof = engine.load_weights(flatten(other), 1)
        found += stream
    assert (proof.version, proof.checksum) == (1, TorchEngine(other).proof.checksum)
    assert any(graph.replays > count for graph, count in before.items()), "the recordings are those from before"
    for trajectory in found:
        if policy == "recompute":
            twin = Changing(plain_twin(start), plain_twin(other), switch=switch)
            assert_equal(trajectory, requests[trajectory.group_id], twin, start, LONG)
        assert trajectory.stale_cache == (policy == "keep" and trajectory.weight_versions[-1] == 1)


def test_recordings_are_made_anew_when_the_cache_moves_and_make_room_for_newer_ones(model, twin, monkeypatch):
    monkeypatch.setattr(actors.graphs, "RECORDED_AT_MOST", 2)
    rule, found, pools = replace(NO_STOP, max_new_tokens=48), [], set()
    with PretendCuda() as cuda:
        engine = on_gpu(cuda_graphs=True, max_batch=4)
        for lengths in ([9, 12, 7], [60, 30, 5], [9, 12]):
            requests = make_requests(lengths)
            for trajectory in engine.stream(requests, rule):
                found.append((trajectory, requests[trajectory.group_id]))
                assert len(engine._graphs.shapes) <= 2
            pools.add(cuda.graphs[-1].pool)
        engine.sleep()
        assert engine._graphs.shapes == []
        found += [(trajectory, requests[trajectory.group_id]) for trajectory in engine.stream(requests, rule)]
    assert len(found) == 10
    assert len(cuda.graphs) > 4
    assert len(pools) > 1, "memory of recordings that are all gone is given to none"
    for trajectory, request in found:
        assert_equal(trajectory, request, twin, model, rule)


def test_a_shape_that_cannot_be_recorded_for_want_of_memory_is_run_without(model, twin, monkeypatch):
    tried = []

    def full(graph, **settings):
        tried.append(graph)
        raise torch.OutOfMemoryError("no memory for this graph")

    requests = make_requests([5, 18, 9])
    with PretendCuda() as cuda:
        monkeypatch.setattr(torch.cuda, "graph", full)
        engine = on_gpu(cuda_graphs=True)
        found = list(engine.stream(requests, LONG))
        monkeypatch.undo()
    assert tried
    assert engine.stats.graphed > len(tried)
    assert cuda.graphs == []
    for trajectory in found:
        assert_equal(trajectory, requests[trajectory.group_id], twin, model, LONG)


def test_the_checks_of_gpu_sh_hold_here_but_for_those_of_cudas_own_kernels():
    with PretendCuda() as cuda:
        model = checks.random_model(checks.SHAPE, device=torch.device("cpu"), dtype=torch.float32, seed=0).to(CUDA)
        assert checks.tokens_that_differ(model, cuda_graphs=True) == 0
        assert checks.tokens_that_differ_in_flight(model, cuda_graphs=True) == 0
    assert sum(graph.replays for graph in cuda.graphs) > 20


def test_greedy_decoding_holds_no_logits_in_fp32():
    """In bf16, of a vocabulary far larger than anything else in the pass."""
    shape, sizes = (16, 1, 1, 1, 16, 32, 70_000), {}
    for temperature in (0.0, 1.0):
        with PretendCuda() as cuda:
            model = checks.random_model(shape, device=torch.device("cpu"), dtype=torch.bfloat16, seed=0).to(CUDA)
            engine = TorchEngine(model)
            cuda.made.clear()
            engine.generate(make_requests([5, 9]), replace(NO_STOP, max_new_tokens=8, temperature=temperature))
        sizes[temperature] = cuda.made[torch.float32] / cuda.made[torch.bfloat16]
    assert sizes[0.0] < 0.5, "a piece of the vocabulary at a time"
    assert sizes[1.0] == 1.0, "one copy, which the draw overwrites"
