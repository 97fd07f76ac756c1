"""Continuous batching: whatever is decoded together, and whatever happens on the way, each sequence is its own.

Everything is compared with the plain reference decoder (tests/reference.py), which knows one sequence, no cache and
no batch.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import DYNAMIC, NO_STOP, assert_equal
from reference import Changing, ChangingWithKeptCache, decode, plain_twin
from synthetic import make_model, make_requests

from actors.engine import UNPROVEN
from actors.kv_cache import KVCache
from actors.torch_engine import TorchEngine
from benchmarks import plain_decoder
from tstar_ray.decoding import Variant
from tstar_ray.trajectory import Request, tokens_per_forward
from tstar_ray.weights import checksum, flatten

MIX = [
    DYNAMIC,
    replace(DYNAMIC, block_size=16, strategy="static", denoising_steps=5, max_new_tokens=40),
    replace(DYNAMIC, block_size=1, temperature=0.7),
    replace(DYNAMIC, block_size=8, strategy="sequential", denoising_steps=3, top_k=9),
    replace(DYNAMIC, block_size=32, strategy="entropy", entropy_bound=4.0, max_new_tokens=70),
    replace(DYNAMIC, block_size=8, temperature=0.0, strategy="static"),
]


@pytest.mark.parametrize("max_batch", [3, 7, 128])
def test_invariant_1_block_sizes_strategies_and_temperatures_share_passes(model, twin, max_batch):
    """Each stream is asked for before the first is consumed, so that all decode together."""
    engine = TorchEngine(model, max_batch=max_batch)
    asked = [(make_requests([5, 18, 9, 33], seed=i), decoding) for i, decoding in enumerate(MIX)]
    streams = [engine.stream(requests, decoding) for requests, decoding in asked]
    found = [list(stream) for stream in streams]
    for (requests, decoding), trajectories in zip(asked, found):
        assert sorted(t.group_id for t in trajectories) == [0, 1, 2, 3]
        for trajectory in trajectories:
            assert_equal(trajectory, requests[trajectory.group_id], twin, model, decoding)
    longest = max(t.denoising_steps for trajectories in found for t in trajectories)
    total = sum(t.denoising_steps for trajectories in found for t in trajectories)
    assert longest <= engine.stats.forwards <= total
    if max_batch == 128:
        assert engine.stats.forwards == longest, "all in the same passes"


@pytest.mark.parametrize("seed", range(8))
def test_invariant_1_whenever_requests_come_and_go(model, twin, seed):
    """Arrivals, cancellations, slots and memory drawn at random, between the rounds: what is left is as if alone."""
    chance = np.random.default_rng(seed)
    per_position = KVCache(model.hf.config, dtype=torch.float32, device=torch.device("cpu")).bytes_per_position
    engine = TorchEngine(
        model,
        max_batch=int(chance.integers(2, 9)),
        cache_gb=int(chance.integers(150, 600)) * per_position / 2**30,
        pass_tokens=int(chance.integers(20, 200)),
    )
    rules = [replace(DYNAMIC, block_size=b, temperature=t) for b, t in ((4, 1.0), (8, 0.0))]
    prompts = [r.prompt_ids for r in make_requests(chance.integers(3, 40, size=8).tolist(), seed=seed)]
    waiting = [Request(i, 0, prompts[chance.integers(8)], seed=100 + i) for i in range(24)]
    asked, cancelled = {}, set()
    while waiting or engine._under_way():
        if waiting and (chance.random() < 0.3 or not engine._under_way()):
            count = int(chance.integers(1, 7))
            unit, waiting, rule = waiting[:count], waiting[count:], rules[chance.integers(2)]
            asked |= {ticket: (r, rule) for ticket, r in zip(engine._submit(unit, rule), unit)}
        if chance.random() < 0.05 and engine._under_way():
            gone = chance.choice([r.group_id for r in engine._under_way().values()])
            engine.cancel([gone])
            cancelled.add(gone)
        if engine._under_way():
            engine._round()
    for ticket, (request, rule) in asked.items():
        if request.group_id not in cancelled:
            assert_equal(engine._ended[ticket], request, twin, model, rule)
    assert len(asked) > len(cancelled)


def test_samples_of_a_group_may_be_decoded_in_different_ways(model, twin):
    """Each as if its own settings were those of the whole call."""
    prompt = make_requests([14])[0].prompt_ids
    variants = [None, Variant(threshold=0.04), Variant(sub_block=2)]
    requests = [Request(0, i, prompt, seed=60 + i, variant=variants[i % 3]) for i in range(6)]
    base = replace(NO_STOP, block_size=8, max_new_tokens=32)
    own = [base, replace(base, threshold=0.04), replace(base, order="sub_blocks", sub_block=2)] * 2
    found = TorchEngine(model).generate(requests, base)
    for request, trajectory, decoding in zip(requests, found, own):
        assert_equal(trajectory, request, twin, model, decoding)
    alike = TorchEngine(model).generate([replace(r, variant=None) for r in requests], base)
    same = [a.step_map.tolist() == b.step_map.tolist() for a, b in zip(found, alike)]
    assert same[::3] == [True, True]
    assert not all(same[1::3])
    assert not all(same[2::3])


def test_a_request_may_have_a_cap_of_its_own(model, twin):
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests([5, 6, 7]), (3, 11, 999), strict=True)]
    found = TorchEngine(model).generate(requests, NO_STOP)
    assert [t.completion_len for t in found] == [3, 10, 21]
    with pytest.raises(ValueError, match="max_new_tokens=2 does not complete one block of 4 after a prompt of 5"):
        TorchEngine(model).generate([replace(requests[0], max_new_tokens=2)], NO_STOP)


def changed_after(model, engine, requests, decoding, other):
    """Decode, and load the weights of ``other`` once the first sequence has ended; returns (found, step of change)."""
    stream = engine.stream(requests, decoding)
    first = next(stream)
    switch = engine.stats.forwards
    proof = engine.load_weights(flatten(other), 1)
    assert (proof.version, proof.checksum) == (1, checksum(flatten(other)))
    return [first, *stream], switch


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_trap_31_invariant_1_weights_in_flight(block, policy):
    """Sequences of several lengths, in mid-block or not, with prompts shared or not, when new weights come."""
    start, other = make_model(seed=2), make_model(seed=8)
    served = make_model(seed=2)
    engine = TorchEngine(served, cache_update=policy, pass_tokens=64)
    requests = make_requests([5, 18, 33, 18, 2])
    requests[3] = replace(requests[3], prompt_ids=requests[1].prompt_ids)
    caps = (block + 4, 2 * block + 14, 4 * block + 20, 3 * block + 9, 5 * block)
    requests = [replace(r, max_new_tokens=cap) for r, cap in zip(requests, caps, strict=True)]
    decoding = replace(NO_STOP, block_size=block, max_new_tokens=5 * block + 20)
    found, switch = changed_after(start, engine, requests, decoding, other)
    kind = Changing if policy == "recompute" else ChangingWithKeptCache
    assert len(found) == 5
    for trajectory in found:
        twin = kind(plain_twin(start), plain_twin(other), switch=switch)
        assert_equal(trajectory, requests[trajectory.group_id], twin, start, decoding)
        # The version of a block is that of the step that revealed its first tokens.
        position = trajectory.prompt_len + np.arange(len(trajectory.step_map))
        number = position // block - trajectory.prompt_len // block
        first_step = [trajectory.step_map[number == k].min() for k in range(trajectory.blocks)]
        assert trajectory.weight_versions.tolist() == [int(step > switch) for step in first_step]
        goes_on = trajectory.denoising_steps > switch
        cached = goes_on and position[trajectory.step_map == switch][0] // block > 0
        assert trajectory.stale_cache == (cached and policy == "keep")
    assert any(len(set(t.weight_versions)) == 2 for t in found), "a sequence saw both"


def test_invariant_8_an_update_that_fails_half_way_leaves_no_proof_and_decodes_nothing():
    model = make_model(seed=2)
    engine, flat = TorchEngine(model), flatten(make_model(seed=8))
    under_way = engine.stream(make_requests([9]), NO_STOP)
    with torch.inference_mode():
        last = torch.nn.Parameter(model.hf.lm_head.weight.clone())  # which cannot be written to outside of that mode
    whole, model.hf.lm_head.weight = model.hf.lm_head.weight, last
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        engine.load_weights(flat, 1)
    assert engine.proof == UNPROVEN
    with pytest.raises(RuntimeError, match="nothing is decoded with half an update of the weights"):
        list(under_way)
    model.hf.lm_head.weight = whole
    assert engine.load_weights(flat, 1).checksum == checksum(flat)
    assert len(engine.generate(make_requests([9]), NO_STOP)) == 1


def test_what_new_weights_recompute_is_read_in_pieces_too():
    engine = TorchEngine(make_model(seed=2), pass_tokens=16)
    found, switch = changed_after(
        make_model(seed=2),
        engine,
        [replace(r, max_new_tokens=n) for r, n in zip(make_requests([12, 28]), (4, 40), strict=True)],
        replace(NO_STOP, max_new_tokens=40),
        make_model(seed=8),
    )
    assert engine.stats.prefills > 2
    twin = Changing(plain_twin(make_model(seed=2)), plain_twin(make_model(seed=8)), switch=switch)
    request = replace(make_requests([12, 28])[1], max_new_tokens=40)
    assert_equal(found[1], request, twin, make_model(seed=2), replace(NO_STOP, max_new_tokens=40))


def test_statistics_add_up(model):
    engine = TorchEngine(model, max_batch=4)
    found = engine.generate(make_requests([5, 9, 12, 20, 7, 8]), DYNAMIC)
    stats = engine.stats
    assert stats.sequences == 6
    assert stats.completion_tokens == sum(t.completion_len for t in found)
    assert stats.sequence_steps == stats.denoising_steps == sum(t.denoising_steps for t in found)
    assert stats.steps_per_block == stats.denoising_steps / sum(t.blocks for t in found)
    for commits in (False, True):
        assert stats.tokens_per_forward(commits=commits) == tokens_per_forward(found, commits=commits)
    assert min(stats.forward_seconds, stats.sampling_seconds, stats.host_seconds) > 0


def test_trap_33_bf16_stays_near_what_fp32_says_of_its_tokens():
    """Weights rounded to bf16, decoded in bf16, scored in fp32: the drift that ratios of a bf16 engine carry."""
    rough = make_model(seed=2).bfloat16()
    exact = make_model(seed=2).bfloat16().float()
    decoding = replace(NO_STOP, max_new_tokens=64)
    drift = []
    for request, trajectory in zip(
        make_requests([5, 12, 19, 30]), TorchEngine(rough).generate(make_requests([5, 12, 19, 30]), decoding)
    ):
        assert trajectory.validate().prompt_len == len(request.prompt_ids)
        drift.append(replayed(plain_twin(exact), exact, trajectory) - trajectory.logprobs)
    drift = np.abs(np.concatenate(drift))
    assert 0 < drift.mean() < 0.01
    assert drift.max() < 0.05


def replayed(twin, model, trajectory):
    """[T - P] log-probs of a trajectory's tokens, every step by one plain forward over the whole sequence."""
    found = np.zeros(len(trajectory.step_map))
    reveal = np.concatenate([np.zeros(trajectory.prompt_len), trajectory.step_map])
    block = np.arange(len(reveal)) // trajectory.block_size
    for step in range(1, trajectory.denoising_steps + 1):
        here = np.flatnonzero(reveal == step)
        end = (block[here[0]] + 1) * trajectory.block_size
        ids = [int(t) if r < step else model.mask_id for t, r in zip(trajectory.token_ids[:end], reveal)]
        changing = Changing(twin, twin, switch=0)
        start = end - trajectory.block_size
        logits = changing.block_logits(ids[:start], ids[start:], step, trajectory.block_size)
        logits[:, model.suppressed_V] = -torch.inf
        logprobs = torch.log_softmax(logits, -1)
        for p in here:
            found[p - trajectory.prompt_len] = logprobs[p - start, int(trajectory.token_ids[p])]
    return found


@pytest.mark.parametrize("decoding", MIX, ids=lambda d: d.describe())
def test_the_benchmarks_plain_decoder_decodes_the_same(model, twin, decoding):
    for request in make_requests([3, 16, 21]):
        ids, steps, length, forwards = plain_decoder.decode(model, request, decoding)
        expected = decode(twin, model, list(request.prompt_ids), decoding, request.seed)
        assert (ids, steps, length) == (expected[0], expected[1], expected[3])
        blocks = len(ids) // decoding.block_size - len(request.prompt_ids) // decoding.block_size
        reads = int(len(request.prompt_ids) >= decoding.block_size)
        assert forwards == reads + max(steps) + blocks - 1, "a pass for every commit"
