"""What the tests of the vLLM engine share."""

from dataclasses import replace

import numpy as np
from reference import decode

from tstar_ray.decoding import Decoding

MiB = 2**-10
DYNAMIC = Decoding(block_size=4, max_new_tokens=24, stop_ids=(7, 11), threshold=0.12)
NO_STOP = replace(DYNAMIC, stop_ids=())


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
