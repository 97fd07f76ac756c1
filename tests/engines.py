"""Trajectories of engines against the plain reference decoder, which knows one sequence, no cache and no batch."""

from dataclasses import replace

import numpy as np
from reference import decode

from tstar_ray.decoding import Decoding

DYNAMIC = Decoding(block_size=4, max_new_tokens=24, stop_ids=(7, 11), threshold=0.12)
NO_STOP = replace(DYNAMIC, stop_ids=())


def assert_equal(trajectory, request, twin, model, decoding):
    if request.max_new_tokens:
        decoding = replace(decoding, max_new_tokens=request.max_new_tokens)
    ids, steps, logprobs, length, reason = decode(twin, model, list(request.prompt_ids), decoding, request.seed)
    assert trajectory.validate().token_ids.tolist() == ids
    assert trajectory.step_map.tolist() == steps
    assert (trajectory.completion_len, trajectory.stop_reason) == (length, reason)
    np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=1e-5)
