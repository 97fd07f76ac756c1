"""The vLLM engine while weights, failures and lost workers come between its steps, on a real vLLM on CPU."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import DYNAMIC, NO_STOP, assert_same, assert_vllm_equal, assert_weights_get_in_between_the_steps
from jobs import needs_vllm
from reference import plain_twin
from synthetic import make_model, make_requests

from actors.torch_engine import TorchEngine
from tstar_ray.weights import checksum, flatten

pytestmark = needs_vllm


def block_logprobs(twin, model, trajectory, block):
    """Log-probs of one decoded block, each step by one plain forward; NaN elsewhere."""
    b, prompt = trajectory.block_size, trajectory.prompt_len
    found = np.full(len(trajectory.step_map), np.nan)
    reveal = np.concatenate([np.zeros(prompt, dtype=int), trajectory.step_map])
    first = (prompt // b + block) * b
    ids = trajectory.token_ids.tolist()
    visible = torch.arange(first + b) // b
    visible = (visible[None, :] <= visible[:, None])[None, None]
    for step in np.unique(reveal[first : first + b]):
        if step == 0:
            continue
        shown = [t if r < step else model.mask_id for t, r in zip(ids[: first + b], reveal)]
        with torch.no_grad():
            logits = twin(torch.tensor([shown]), attention_mask=visible).logits[0].double()
        logits[:, model.suppressed_V] = -torch.inf
        for p in np.flatnonzero(reveal[: first + b] == step):
            found[p - prompt] = torch.log_softmax(logits[p], -1)[ids[p]]
    return found


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_trap_31_invariant_8_weights_in_flight(serve, model, policy, ahead):
    """Loaded when the first of several sequences has ended: the others go on, each block of the version it names."""
    other = make_model(seed=8)
    engine = serve(cache_update=policy, async_scheduling=ahead)
    assert (engine._core.engine_core.batch_queue is not None) == ahead
    requests = [
        replace(r, max_new_tokens=n) for r, n in zip(make_requests([5, 18, 33, 140]), (19, 40, 48, 44), strict=True)
    ]
    decoding = replace(NO_STOP, block_size=8, max_new_tokens=48)
    waiting = engine.stream(requests, decoding)
    found = [next(waiting)]
    proof = engine.load_weights(flatten(other), 1)
    assert (proof.version, proof.checksum) == (1, checksum(flatten(other)))
    assert engine.proof == proof
    found += waiting
    assert len(found) == 4
    versions = [set(t.validate().weight_versions.tolist()) for t in found]
    assert versions[0] == {0}
    assert {0, 1} in versions, "a sequence saw both"
    twins = {0: plain_twin(model), 1: plain_twin(other)}
    for trajectory in found:
        assert (np.diff(trajectory.weight_versions) >= 0).all()
        mixed = len(set(trajectory.weight_versions.tolist())) > 1
        assert trajectory.stale_cache == (policy == "keep" and trajectory is not found[0])
        for k, version in enumerate(trajectory.weight_versions.tolist()):
            if policy == "keep" and (mixed or version):
                continue  # its cache is of both
            exact = block_logprobs(twins[version], model, trajectory, k)
            here = ~np.isnan(exact)
            np.testing.assert_allclose(trajectory.logprobs[here], exact[here], atol=2e-5)
    later = engine.generate(requests, decoding)
    assert_same(later, [replace_versions(t, 1) for t in TorchEngine(other).generate(requests, decoding)])


def test_a_trainer_is_met_between_two_steps(serve, monkeypatch):
    engine, closed = serve(), []
    monkeypatch.setattr(engine._core, "collective_rpc", lambda *_, **__: closed.append(not engine._may_drive()))
    engine.join_transfer({})
    assert closed == [True], "no round begins meanwhile"


def test_what_waits_for_its_turn_never_finds_pages_of_older_weights(serve, model):
    """Nor is it marked: of two requests with one prompt the first is under way, and its prompt in the cache."""
    other = make_model(seed=8)
    engine = serve(cache_update="keep", max_batch=1)
    requests = [replace(r, group_id=i, seed=i) for i, r in enumerate(make_requests([150]) * 2)]
    waiting = engine.stream([replace(requests[0], max_new_tokens=40), requests[1]], replace(NO_STOP, max_new_tokens=40))
    while engine.stats.passes < 5:
        engine._round()
    engine.load_weights(flatten(other), 1)
    first, second = waiting
    assert (first.stale_cache, second.stale_cache) == (True, False)
    expected = TorchEngine(other).generate(requests[1:], replace(NO_STOP, max_new_tokens=40))
    assert_same([second], [replace_versions(t, 1) for t in expected])


def test_a_failed_update_leaves_no_proof(serve, model, monkeypatch):
    engine = serve()
    flat = flatten(make_model(seed=8))
    with pytest.raises(ValueError, match=rf"flat buffer holds {len(flat) + 1} values, the model has {len(flat)}"):
        engine.load_weights(torch.cat([flat, flat[:1]]), 1)
    assert engine.proof.version == 0, "nothing was touched"
    served = engine._core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    with monkeypatch.context() as patch:
        patch.setattr(served, "load_weights", lambda named: next(named).fail())
        with pytest.raises(AttributeError):
            engine.load_weights(flat, 1)
    assert engine.proof.version < 0
    assert engine.load_weights(flat, 1).checksum == checksum(flat)


def replace_versions(trajectory, version):
    return dataclasses.replace(trajectory, weight_versions=np.full_like(trajectory.weight_versions, version))


def test_weights_get_in_between_the_steps_of_a_busy_engine(serve):
    engine = serve()
    assert_weights_get_in_between_the_steps(engine, replace(NO_STOP, max_new_tokens=200), lambda: engine.stats.passes)


def test_a_failed_step_loses_what_was_under_way_and_nothing_else(serve, model, twin, monkeypatch):
    engine = serve()
    runner = engine._core.engine_core.model_executor.driver_worker.worker.model_runner
    sampler, calls = runner.sampler, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return sampler(*arguments)

    monkeypatch.setattr(runner, "sampler", failing)
    failing.add_request, failing.apply_staged_writes = sampler.add_request, sampler.apply_staged_writes
    failing.penalties_state = sampler.penalties_state
    other = engine.stream(make_requests([6], seed=3), NO_STOP)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(make_requests([9, 12]), NO_STOP)
    with pytest.raises(RuntimeError, match="failed in another call, which took this call's sequences with it"):
        list(other)
    for request, trajectory in zip(make_requests([9, 12]), engine.generate(make_requests([9, 12]), DYNAMIC)):
        assert_vllm_equal(trajectory, request, twin, model, DYNAMIC)


def in_a_process(script, *arguments, code=0):
    """Run a script of tests/actors beside this file to this exit code, and return the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ
        | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line[:1] in ("{", "n")))


def test_two_ranks_over_gloo_decode_the_same_prove_the_same_weights_and_end_together(blueprint):
    """An actor with a dead rank ends, so that it is replaced; one that lived on would fail whatever it is given."""
    found = in_a_process("vllm_two_ranks.py", blueprint.path, code=1)
    assert found == {"checksums": True, "tokens": True, "updated": True, "in_flight": True, "alive": True}


def test_weights_by_vllms_transfer_api_from_a_trainer_over_gloo(blueprint):
    found = in_a_process("vllm_transfer.py", blueprint.path)
    assert found["checksum"] == checksum(flatten(make_model(seed=8)))
    assert found["versions"] == [0, 1]
    assert found["tokens"], "what follows is decoded with the new weights"
