"""What the tests of both engines share: trajectories against the plain reference decoder, which knows one sequence, no
cache and no batch, one engine against another, and weights that come between the steps of a busy one."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from reference import decode
from synthetic import make_model, make_requests

from tstar_ray.decoding import Decoding
from tstar_ray.weights import flatten

MiB = 2**-10
DYNAMIC = Decoding(block_size=4, max_new_tokens=24, stop_ids=(7, 11), threshold=0.12)
NO_STOP = replace(DYNAMIC, stop_ids=())
RULES = [
    DYNAMIC,
    replace(NO_STOP, block_size=8, temperature=0.0),
    replace(NO_STOP, block_size=2, temperature=0.7, top_k=20, top_p=0.9),
    replace(NO_STOP, block_size=16, strategy="entropy", entropy_bound=3.0),
    replace(NO_STOP, block_size=4, strategy="static", denoising_steps=2, order="random"),
    replace(NO_STOP, block_size=8, strategy="sequential", confidence="sampled", temperature=1.3, top_k=9),
]


def assert_equal(trajectory, request, twin, model, decoding, *, atol=1e-5):
    """An engine's trajectory is that of the plain reference decoder."""
    if request.max_new_tokens:
        decoding = replace(decoding, max_new_tokens=request.max_new_tokens)
    ids, steps, logprobs, length, reason = decode(twin, model, list(request.prompt_ids), decoding, request.seed)
    assert trajectory.validate().token_ids.tolist() == ids
    assert trajectory.step_map.tolist() == steps
    assert (trajectory.completion_len, trajectory.stop_reason) == (length, reason)
    np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=atol)


assert_vllm_equal = partial(assert_equal, atol=2e-5)


def assert_same(found, expected):
    """Two engines' trajectories of the same requests."""
    for a, b in zip(found, expected, strict=True):
        assert a.validate().token_ids.tolist() == b.token_ids.tolist()
        assert a.step_map.tolist() == b.step_map.tolist()
        for name in ("group_id", "sample", "prompt_len", "completion_len", "block_size", "temperature", "stop_reason"):
            assert getattr(a, name) == getattr(b, name), name
        assert a.weight_versions.tolist() == b.weight_versions.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def assert_weights_get_in_between_the_steps(engine, decoding, steps):
    """A second thread decodes without end; the first pauses it, looks, and loads weights three times. ``steps`` counts
    the engine's own."""
    flat = flatten(make_model(seed=8))
    found, stop, started = [], threading.Event(), threading.Event()

    def work():
        torch.set_num_threads(1)
        while not stop.is_set():
            for trajectory in engine.stream(make_requests([9, 20, 13]), decoding):
                found.append(trajectory)
                started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    for version in (1, 2, 3):
        with engine.paused():
            before = steps()
            assert not stop.wait(0.05)
            assert steps() == before
            assert engine.load_weights(flat, version).version == version, "also from inside a pause"
        seen = len(found)
        while len(found) < seen + 3:
            assert not stop.wait(0.01)
            assert thread.is_alive()
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert {0, 1, 2, 3} <= {int(v) for t in found for v in t.weight_versions}
    assert all((np.diff(t.weight_versions) >= 0).all() for t in found)
