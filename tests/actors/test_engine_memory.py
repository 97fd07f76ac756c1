"""Slots, the cache and the size of a pass: what the engine holds, and when it reads prompts.

Every trajectory is compared with the plain reference decoder.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import DYNAMIC, NO_STOP, assert_equal
from synthetic import make_requests
from torch.utils._python_dispatch import TorchDispatchMode

from actors import kv_cache, slots
from actors.kv_cache import KVCache, Rows, cut_runs
from actors.torch_engine import TorchEngine
from tstar_ray.trajectory import Request


def test_slots_are_never_idle_while_something_waits(model):
    engine = TorchEngine(model, max_batch=3)
    requests = [
        replace(r, max_new_tokens=n) for r, n in zip(make_requests([8] * 9), (32, 4, 4, 4, 16, 4, 8, 4, 4), strict=True)
    ]
    static = replace(NO_STOP, strategy="static", max_new_tokens=32)
    found = engine.generate(requests, static)
    assert [t.completion_len for t in found] == [r.max_new_tokens for r in requests]
    # 80 steps of work for three slots, one token each; the first request alone takes 32 of them.
    assert engine.stats.forwards == 32
    assert engine.stats.occupancy == 80 / 32


def test_trap_48_memory_is_reserved_for_the_longest_and_never_exceeded(model, twin, monkeypatch):
    """Requests of growing length under a cache for three short sequences, or one long one."""
    held = []
    resize = KVCache.resize

    def recording(self, slots, length, *, kept):
        held.append((slots, length))
        resize(self, slots, length, kept=kept)

    monkeypatch.setattr(KVCache, "resize", recording)
    per_position = KVCache(model.hf.config, dtype=torch.float32, device=torch.device("cpu")).bytes_per_position
    engine = TorchEngine(model, cache_gb=100 * per_position / 2**30)
    requests = [
        replace(r, max_new_tokens=n)
        for r, n in zip(make_requests([3, 9, 8, 40, 5, 12, 6]), (20, 24, 24, 60, 12, 20, 8), strict=True)
    ]
    decoding = replace(DYNAMIC, max_new_tokens=60)
    for request, trajectory in zip(requests, engine.generate(requests, decoding)):
        assert_equal(trajectory, request, twin, model, decoding)
    assert max(slots * length for slots, length in held) <= 100
    assert max(length for _, length in held) == 100, "the long one was served"
    assert max(slots for slots, _ in held) >= 3, "the short ones were served together"


def test_the_prompt_of_a_group_is_read_once(model, twin):
    prompt = make_requests([14])[0].prompt_ids
    requests = [Request(0, i, prompt, seed=50 + i) for i in range(6)]
    # Two at a time end together, so that the next two find nobody to copy from.
    for max_batch, reads in ((6, 1), (2, 3), (1, 6)):
        engine = TorchEngine(model, max_batch=max_batch)
        found = engine.generate(requests, NO_STOP)
        for request, trajectory in zip(requests, found):
            assert_equal(trajectory, request, twin, model, NO_STOP)
        # Every step computes a block; every block but the last is computed once more to be committed.
        queries = sum(4 * (t.denoising_steps + t.blocks - 1) for t in found)
        assert engine.stats.forwarded_tokens == queries + reads * 12


def test_prompts_beyond_the_pass_limit_are_read_in_pieces(model, twin):
    engine = TorchEngine(model, pass_tokens=16)
    requests = make_requests([70, 3, 41, 22])
    for request, trajectory in zip(requests, engine.generate(requests, DYNAMIC)):
        assert_equal(trajectory, request, twin, model, DYNAMIC)
    assert engine.stats.prefills == 4 + 3 + 1, "what is left of 68, 40 and 20 is no more than a block"


def test_short_prompts_beyond_the_pass_limit_share_passes(model, twin):
    """8 prompts of 20 tokens: four are read in a pass of 88, then four more, and all take their first step together."""
    engine = TorchEngine(model, pass_tokens=88)
    requests = make_requests([20] * 8)
    for request, trajectory in zip(requests, engine.generate(requests, DYNAMIC)):
        assert_equal(trajectory, request, twin, model, DYNAMIC)
    assert engine.stats.prefills == 2


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do, and the most elements that an operation returns outside the cache."""

    def __init__(self, cache):
        super().__init__()
        self.cache, self.counts, self.largest = cache, Counter(), 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        self.counts[function.overloadpacket.__name__] += 1
        held = {tensor.untyped_storage().data_ptr() for tensor in (*self.cache.keys, *self.cache.values)}
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, tensor.numel())
        return found


def test_a_long_prompt_beside_short_ones_is_not_padded_against_them(model, twin, monkeypatch):
    """Padded together, 28 prompts would take 28 x 400 queries x 400 keys x 2 heads: 9M scores."""
    requests = make_requests([15] * 14 + [400] + [15] * 13)
    one_token = replace(NO_STOP, max_new_tokens=4, strategy="static")
    for at_once, bound in ((2**22, 400 * 512 * 2 * 2), (2**14, (27 * 16 + 404) * 8 * 32)):
        monkeypatch.setitem(kv_cache.SCORES_AT_ONCE, "cpu", at_once)
        engine = TorchEngine(model)
        engine._submit(requests, one_token)
        engine._admit()
        with Operations(engine._cache) as seen:
            engine._round()
        assert engine.stats.passes == 1
        assert seen.largest <= bound, "scores of a run for both key heads, or all tokens' queries, keys and values"
        while engine._under_way():
            engine._round()
        for i in (0, 14, 27):
            assert_equal(engine._ended[i], requests[i], twin, model, one_token)


@pytest.mark.parametrize("seed", range(4))
def test_runs_hold_every_query_once_and_are_bounded(seed):
    chance = np.random.default_rng(seed)
    block = 2 ** chance.integers(0, 6, size=40)
    start, blocks = block * chance.integers(0, 30, size=40), chance.choice([1, 1, 2, 2, 40], size=40)
    rows = Rows(np.arange(40), start, start + blocks * block, block, np.full(40, -1))
    at_once = int(chance.choice([2**10, 2**14, 2**20]))
    computed = []
    for a, b, begin, stop in cut_runs(rows, at_once=at_once, run_cost=100):
        longest, keys = stop - begin, rows.end[a:b].max()
        assert (b - a) * longest * keys <= max(at_once, keys)
        if b > a + 1:
            assert (b - a) * longest * keys <= 2 * (rows.lengths * rows.end)[a:b].sum() + 100
        computed += [(row, q) for row in range(a, b) for q in range(begin, min(stop, rows.lengths[row]))]
    assert computed == [(row, q) for row in range(40) for q in range(rows.lengths[row])]


def test_a_round_asks_the_device_once_and_sends_once_whatever_the_number_of_rules_and_samples(model, monkeypatch):
    """Copies of a prompt's keys and values cost no more for 15 samples than for 3."""
    asked = Counter()

    def counted(name, owner):
        real = getattr(owner, name)

        def call(*arguments, **keywords):
            asked[name] += 1
            return real(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    for name, owner in (("from_numpy", torch), ("tensor", torch), ("as_tensor", torch), ("cpu", torch.Tensor)):
        counted(name, owner)
    prompt, copies = make_requests([30])[0].prompt_ids, []
    for rules, samples in ((1, 4), (4, 16)):
        engine = TorchEngine(model)
        for i in range(rules):
            rule = replace(NO_STOP, threshold=0.9 + i / 100)
            engine._submit([Request(0, 4 * i + k, prompt, seed=i + k) for k in range(samples // rules)], rule)
        with Operations(engine._cache) as first:
            engine._round()
        copies.append(first.counts["index_put_"] - 6 * rules)  # without those of the steps
        asked.clear()
        with Operations(engine._cache) as later:
            engine._round()
        assert asked == {"from_numpy": 1, "cpu": 1}
        assert not later.counts.keys() & {"_local_scalar_dense", "nonzero", "item"}, "these wait for a GPU"
    assert copies[0] == copies[1]


def test_memory_that_runs_out_is_named_and_the_next_request_is_served(model, twin, monkeypatch):
    """One layer's allocation fails while the cache grows under a sequence that is being decoded."""
    engine = TorchEngine(model, max_batch=8)
    first = engine.stream(make_requests([9, 12]), DYNAMIC)
    engine._round()
    zeros, failing = torch.zeros, iter([False] * 5 + [True])  # three tensors of the slots, two layers of keys

    def scarce(*arguments, **keywords):
        if next(failing, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return zeros(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", scarce)
        with pytest.raises(
            RuntimeError, match=r"no memory for 1.75 MiB of keys and values, .* lower actors.cache_gb=4"
        ):
            engine.generate(make_requests([200, 9]), DYNAMIC)
    with pytest.raises(RuntimeError, match="took this call's sequences with it"):
        list(first)
    assert engine._cache.shape == (0, 0)
    for request, trajectory in zip(make_requests([9, 40]), engine.generate(make_requests([9, 40]), DYNAMIC)):
        assert_equal(trajectory, request, twin, model, DYNAMIC)


def test_the_cache_is_seldom_moved_and_limits_are_computed_once(model, monkeypatch):
    """120 prompts of 10 to 100 tokens, one more in each round, and a cache that holds fifteen or so."""
    moves, limits = [], []
    resize, limit = KVCache.resize, slots.decode_limit

    def moving(self, *shape, kept):
        moves.append(shape)
        resize(self, *shape, kept=kept)

    monkeypatch.setattr(KVCache, "resize", moving)
    monkeypatch.setattr(slots, "decode_limit", lambda *arguments: limits.append(1) or limit(*arguments))
    engine = TorchEngine(model, cache_gb=1500 * TorchEngine(model)._cache.bytes_per_position / 2**30)
    moves.clear()
    for request in make_requests(np.random.default_rng(0).integers(10, 100, size=120).tolist()):
        engine._submit([request], replace(NO_STOP, max_new_tokens=24))
        engine._round()
    while engine._under_way():
        engine._round()
    assert engine.stats.occupancy > 10
    assert len(moves) <= 12, str(moves)
    assert len(limits) == 120
