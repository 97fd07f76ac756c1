"""Slots, the cache and the size of a pass: what the engine holds, and when it reads prompts.

Every trajectory is compared with the plain reference decoder.
"""

from dataclasses import replace

import torch
from engines import DYNAMIC, NO_STOP, assert_equal
from synthetic import make_requests

from actors.kv_cache import KVCache
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
