"""Invariant 1: what the engine recorded is what the reference decoder and the learner's geometry say.

The engine (KV cache, ragged batches, commits fused into the next step, slots that are re-used) against a decoder
that has none of that, and against the learner's slices, each as a dense row of its own and all of them packed.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import decode, plain_twin, staircase_logits
from synthetic import MASK_ID, make_model, make_requests

from actors.torch_engine import TorchEngine
from learner.packing import pack, slice_sample, token_weights
from tstar_ray.blocks import build_slices, train_visibility
from tstar_ray.decoding import Decoding
from tstar_ray.model import TrainLayout
from tstar_ray.trajectory import Request
from tstar_ray.unmask import draw, uniforms

BLOCKS = [1, 2, 4, 8, 16, 32]
STRATEGIES = {
    "dynamic": {"strategy": "dynamic", "threshold": 0.12},
    "dynamic-few-steps": {"strategy": "dynamic", "threshold": 0.3, "denoising_steps": 3},
    "static": {"strategy": "static"},
    "static-few-steps": {"strategy": "static", "denoising_steps": 3},
    "sequential": {"strategy": "sequential", "denoising_steps": 2},
    "entropy": {"strategy": "entropy", "entropy_bound": 4.0},
}
TEMPERATURES = [1.0, 0.7, 0.0]


def make_decoding(block, name, temperature, **more):
    settings = dict(STRATEGIES[name])
    if settings.get("denoising_steps", 0) > block:
        settings["denoising_steps"] = block
    settings |= {"max_new_tokens": 2 * block + 5, "stop_ids": (7, 11), "temperature": temperature}
    return Decoding(block_size=block, **settings | more)


def prompt_lengths(block):
    """Every length 0 … 2B for small blocks, every residue modulo B over the strategies for large ones."""
    return list(range(2 * block + 1)) if block <= 8 else sorted({0, 1, block - 1, block, block + 1, 2 * block - 3})


def without_a_tie(request, twin, model, decoding):
    """A request without a prompt, with the next seed that does not draw one token twice where its first step has to
    choose: all positions have the same distribution, and rounding would choose between them."""
    b = decoding.block_size
    logits = staircase_logits(twin, [MASK_ID] * b, b).float().masked_fill(model.suppressed_V, -torch.inf)
    position = torch.arange(b)
    for seed in range(request.seed, request.seed + 1000):
        uniform = uniforms(torch.full((b,), seed), position, torch.ones_like(position))
        ranked = draw(logits.clone(), uniform, decoding).confidence.sort(descending=True).values
        due = decoding.quota(0)
        if due == b or ranked[due - 1] - ranked[due] > 1e-6:
            return replace(request, seed=seed)
    raise AssertionError("all seeds tie")


def assert_equals_reference(trajectory, request, model, twin, decoding):
    ids, steps, logprobs, length, reason = decode(twin, model, list(request.prompt_ids), decoding, request.seed)
    assert trajectory.token_ids.tolist() == ids
    assert trajectory.step_map.tolist() == steps
    assert (trajectory.completion_len, trajectory.stop_reason) == (length, reason)
    np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_invariant_1_engine_equals_the_plain_reference_decoder(model, twin, block, name):
    """Tokens, step map, log-probs and stop, with fewer slots than requests so that slots are re-used."""
    temperature = TEMPERATURES[(BLOCKS.index(block) + list(STRATEGIES).index(name)) % 3]
    decoding = make_decoding(block, name, temperature)
    # Without a prompt every position of an all-masked block has the same distribution: here all of them tie.
    tie = temperature == 0 or decoding.strategy == "entropy"
    requests = make_requests([n for n in prompt_lengths(block) if n or not tie], seed=block)
    requests = [r if r.prompt_ids else without_a_tie(r, twin, model, decoding) for r in requests]
    found = TorchEngine(model, max_batch=5).generate(requests, decoding)
    for request, trajectory in zip(requests, found):
        assert_equals_reference(trajectory.validate(), request, model, twin, decoding)


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize(
    "truncation",
    [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}, {"top_k": 3, "confidence": "sampled"}],
    ids=str,
)
def test_trap_23_truncated_sampling_records_the_untruncated_density(model, twin, block, truncation):
    decoding = make_decoding(block, "dynamic", 0.9, **truncation)
    requests = make_requests([3, 8, 13], seed=5)
    for request, trajectory in zip(requests, TorchEngine(model).generate(requests, decoding)):
        assert_equals_reference(trajectory, request, model, twin, decoding)


@pytest.mark.parametrize("order", ["left_to_right", "random", "sub_blocks"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_forced_orders_decode_as_the_plain_reference_does(model, twin, name, order):
    """The ablation of reveal orders: the same counts by the strategy, other positions, and tokens that follow."""
    decoding = make_decoding(8, name, 0.8, order=order, sub_block=3)
    requests = make_requests([3, 8, 13, 5], seed=6)
    for request, trajectory in zip(requests, TorchEngine(model, max_batch=3).generate(requests, decoding)):
        assert_equals_reference(trajectory.validate(), request, model, twin, decoding)
        if order == "left_to_right":
            blocks = (request_offset(trajectory) // 8).tolist()
            steps = trajectory.step_map.tolist()
            assert all(a <= b for a, b, x, y in zip(steps, steps[1:], blocks, blocks[1:]) if x == y)


def request_offset(trajectory):
    return trajectory.prompt_len + np.arange(len(trajectory.step_map))


def rollouts(model, block, name="dynamic", temperature=1.0, count=24, **more):
    requests = make_requests([i % (2 * block + 1) for i in range(count)], seed=100 + block)
    return TorchEngine(model).generate(requests, make_decoding(block, name, temperature, **more))


@pytest.mark.parametrize("block", BLOCKS)
def test_traps_13_and_14_stops_in_mid_block_and_length_caps_both_occur(model, block):
    """What the replay tests below run on: whole terminal blocks, stops before their end, aligned caps."""
    found = rollouts(model, block, count=48)
    stopped = [t for t in found if t.stop_reason == "stop"]
    cut = [t for t in found if t.stop_reason == "length"]
    assert stopped
    assert cut
    assert all(len(t.token_ids) % block == 0 for t in found)
    assert all(t.completion_len <= 2 * block + 5 for t in found)
    if block > 1:
        assert any(t.prompt_len + t.completion_len < len(t.token_ids) for t in stopped), "a stop inside a block"


def dense_logprobs(twin, model, trajectory, block):
    """[C] log-probs of the completion by one plain full forward for each slice."""
    found = np.full(len(trajectory.step_map), np.nan)
    slices = build_slices(
        token_ids=trajectory.token_ids,
        step_map=trajectory.step_map,
        prompt_len=trajectory.prompt_len,
        completion_len=trajectory.completion_len,
        block_size=block,
        mask_id=MASK_ID,
    )
    temperature = trajectory.temperature or 1.0
    for k, noisy, target in zip(slices.block, slices.noisy, slices.target):
        start = k * block
        ids = trajectory.token_ids[:start].tolist() + noisy.tolist()
        logits = staircase_logits(twin, ids, block)[start:] / temperature
        logits[:, model.suppressed_V] = -torch.inf
        logprobs = torch.log_softmax(logits, -1)
        for p in np.flatnonzero(target):
            found[start + p - trajectory.prompt_len] = logprobs[p, int(trajectory.token_ids[start + p])]
    return found[: trajectory.completion_len]


@pytest.mark.parametrize("name", ["dynamic", "static-few-steps", "sequential", "entropy"])
@pytest.mark.parametrize("block", BLOCKS)
def test_invariant_1_slices_replay_the_recorded_log_probs(model, twin, block, name):
    for t in rollouts(model, block, name, temperature=0.7, count=8):
        np.testing.assert_allclose(dense_logprobs(twin, model, t, block), t.logprobs[: t.completion_len], atol=1e-5)


@torch.no_grad()
def packed_error(model, trajectories, block):
    samples = [slice_sample(t, 1.0, block_size=block, mask_id=MASK_ID, shrink=1) for t in trajectories]
    weights = token_weights(samples, "token_mean", length_norm=1)
    worst, targets = 0.0, 0
    for batch in pack(samples, weights, row_tokens=700, micro_batch_tokens=3000):
        layout = TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), torch.float32)
        new, _ = model(
            batch.ids, batch.positions, layout, batch.index, batch.targets, trajectories[0].temperature or 1.0
        )
        worst = max(worst, float((new - batch.recorded).abs().max()))
        targets += len(new)
    assert targets == sum(t.completion_len for t in trajectories), "invariant 2"
    return worst


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_invariant_1_packed_learner_replays_the_recorded_log_probs(model, block, name, temperature):
    assert packed_error(model, rollouts(model, block, name, temperature), block) < 1e-5


@pytest.mark.parametrize("block", [4, 8])
def test_the_replay_check_can_fail(model, block):
    """Three published mistakes, each far above rounding: a grid from the prompt's end, a terminal block cut at the
    stop (traps 1 and 13), and other weights than those that decoded."""
    from dataclasses import replace

    found = rollouts(model, block)
    shifted = [t for t in found if t.prompt_len % block]
    moved = [
        replace(t, token_ids=t.token_ids[t.prompt_len % block :], prompt_len=t.prompt_len - t.prompt_len % block)
        for t in shifted
    ]
    assert packed_error(model, moved, block) > 1e-2
    cut = []
    for t in found:
        ids = t.token_ids.copy()
        ids[t.prompt_len + t.completion_len :] = MASK_ID
        cut.append(replace(t, token_ids=ids))
    assert packed_error(model, cut, block) > 1e-2
    assert packed_error(make_model(seed=3), found, block) > 1e-2


def test_trap_26_a_sample_is_the_same_in_any_batch_and_any_order(model):
    requests = make_requests([3, 9, 4, 17, 8, 1, 30, 12, 5, 5], seed=9)
    decoding = make_decoding(8, "dynamic", 1.0)
    alone = [TorchEngine(model).generate([r], decoding)[0] for r in requests]
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    for max_batch in (1, 3, 128):
        engine = TorchEngine(model, max_batch=max_batch)
        together = dict(zip(order, engine.generate([requests[i] for i in order], decoding)))
        for i, expected in enumerate(alone):
            assert together[i].token_ids.tolist() == expected.token_ids.tolist()
            assert together[i].step_map.tolist() == expected.step_map.tolist()
            np.testing.assert_allclose(together[i].logprobs, expected.logprobs, atol=1e-5)


def test_trap_27_samples_of_one_prompt_differ_and_are_reproducible(model):
    prompt = make_requests([10], seed=1)[0].prompt_ids
    requests = [Request(0, i, prompt, seed=1000 + i) for i in range(16)]
    decoding = make_decoding(4, "dynamic", 1.0)
    first, second = (TorchEngine(model).generate(requests, decoding) for _ in range(2))
    assert [t.token_ids.tolist() for t in first] == [t.token_ids.tolist() for t in second]
    assert len({tuple(t.token_ids) for t in first}) == 16


def test_trap_17_a_stop_token_in_the_prompt_tail_does_not_stop(model):
    """ChatML prompts end with <|im_end|> a few tokens before the answer: from B=8 on it lies in the first block."""
    prompt = (1, 2, 3, 7, 7, 5)
    decoding = make_decoding(8, "dynamic", 1.0, stop_ids=(7,), max_new_tokens=40)
    found = TorchEngine(model).generate([Request(0, i, prompt, seed=i) for i in range(20)], decoding)
    assert any(t.blocks > 1 for t in found)
    assert all(t.token_ids[:6].tolist() == list(prompt) for t in found)


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_trap_16_a_quota_larger_than_what_is_masked_leaves_the_prompt_alone(model, strategy):
    decoding = Decoding(
        block_size=8, max_new_tokens=17, stop_ids=(7,), strategy=strategy, denoising_steps=3, threshold=0.99
    )
    request = make_requests([15], seed=4)[0]
    found = TorchEngine(model).generate([request], decoding)[0]
    assert tuple(found.token_ids[:15]) == request.prompt_ids


def test_trap_25_undefined_ids_are_never_sampled(model):
    """Even where the head is biased towards them; and the learner normalises the same way."""
    biased = make_model(seed=2)
    with torch.no_grad():
        biased.hf.lm_head.weight[62:] *= 50
    found = rollouts(biased, 4)
    assert all(t.token_ids[t.prompt_len :].max() < 62 for t in found)
    assert packed_error(biased, found, 4) < 1e-5


def test_trap_8_a_bridge_concatenates_the_slices_of_the_smaller_blocks(model):
    for t in rollouts(model, 4, count=12):
        arguments = {
            "token_ids": t.token_ids,
            "step_map": t.step_map,
            "prompt_len": t.prompt_len,
            "completion_len": t.completion_len,
            "mask_id": MASK_ID,
        }
        small, large = (build_slices(block_size=b, **arguments) for b in (4, 8))
        assert small.step.tolist() == large.step.tolist(), "the same steps in the same order"
        for k, step, target, noisy in zip(large.block, large.step, large.target, large.noisy):
            i = small.step.tolist().index(step)
            offset = int(small.block[i]) * 4 - k * 8
            assert target[offset : offset + 4].tolist() == small.target[i].tolist()
            assert target.sum() == small.target[i].sum()
            later = np.arange(8) >= offset + 4
            assert (noisy[later & (np.arange(8) + k * 8 >= t.prompt_len)] == MASK_ID).all()


def test_trap_2_and_weight_updates_leave_no_stale_cache(model, twin):
    """The same engine before and after new weights equals fresh engines with either."""
    from tstar_ray.weights import checksum, flatten

    other = make_model(seed=8)
    engine = TorchEngine(make_model(seed=2))
    requests, decoding = make_requests([5, 9, 12]), make_decoding(4, "dynamic", 1.0)
    before = engine.generate(requests, decoding)
    proof = engine.load_weights(flatten(other), 3)
    assert (proof.version, proof.checksum) == (3, checksum(flatten(other)))
    after = engine.generate(requests, decoding)
    for found, source in ((before, model), (after, other)):
        for request, trajectory in zip(requests, found):
            assert_equals_reference(trajectory, request, source, plain_twin(source), decoding)
    assert {int(v) for t in after for v in t.weight_versions} == {3}


def test_block_sizes_may_change_between_calls_of_one_engine(model, twin):
    engine = TorchEngine(model)
    requests = make_requests([2, 11, 6])
    for block in (4, 16, 2, 8):
        decoding = make_decoding(block, "dynamic", 1.0)
        for request, trajectory in zip(requests, engine.generate(requests, decoding)):
            assert_equals_reference(trajectory, request, model, twin, decoding)


def test_forwards_equal_denoising_steps_no_commit_costs_a_pass(model):
    engine = TorchEngine(model)
    found = engine.generate(make_requests([9]), make_decoding(4, "static", 1.0, stop_ids=(61,)))
    assert found[0].blocks > 2
    assert engine.stats.forwards == found[0].denoising_steps
    assert engine.stats.prefills == 0, "the prompt is read in the first of them"


def test_a_cache_too_small_for_one_sequence_is_named(model):
    engine = TorchEngine(model, cache_gb=1e-6)
    with pytest.raises(ValueError, match=r"20 tokens needs 20 KiB of cache, actors.cache_gb=1e-06 allows 1 KiB"):
        engine.generate(make_requests([9]), make_decoding(4, "static", 1.0))


def test_a_token_that_the_model_does_not_know_is_refused_and_costs_nobody_else_a_sequence(model, twin):
    engine, decoding = TorchEngine(model), make_decoding(4, "static", 1.0)
    other = engine.stream(make_requests([9]), decoding)
    for bad in (64, -1):
        with pytest.raises(ValueError, match=f"group 3 holds token {bad}, outside the model's vocabulary of 64"):
            engine.generate([Request(3, 0, (1, bad), 0)], decoding)
    assert_equals_reference(next(other), make_requests([9])[0], model, twin, decoding)


def test_a_mask_token_in_the_prompt_and_a_cap_below_one_block_are_refused(model):
    with pytest.raises(ValueError, match="the prompt of group 3 holds the mask token 63"):
        TorchEngine(model).generate([Request(3, 0, (1, MASK_ID), 0)], make_decoding(4, "static", 1.0))
    with pytest.raises(ValueError, match="max_new_tokens=5 does not complete one block of 8 after a prompt of 1 tok"):
        TorchEngine(model).generate(make_requests([1]), make_decoding(8, "static", 1.0, max_new_tokens=5))
