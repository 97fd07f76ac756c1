"""Two ranks share the model over gloo, against the PyTorch engine, until one is killed; run by test_vllm_weights.py."""

import json
import os
import signal
import sys
from dataclasses import replace

import torch
from synthetic import make_model, make_requests

from actors.rollout import RolloutWorker
from actors.torch_engine import TorchEngine
from actors.vllm_engine import VllmEngine
from actors.vllm_serving import Serving
from tstar_ray.decoding import Decoding
from tstar_ray.model import load_checkpoint, read_blueprint
from tstar_ray.weights import checksum, flatten


def same(found, expected):
    return all(
        a.token_ids.tolist() == b.token_ids.tolist()
        and a.step_map.tolist() == b.step_map.tolist()
        and abs(a.logprobs - b.logprobs).max() < 1e-4
        for a, b in zip(found, expected, strict=True)
    )


def main(path):
    torch.set_num_threads(1)
    engine = VllmEngine(
        read_blueprint(path), Serving(max_block=16, max_tokens=200, max_batch=8, cache_gb=2**-6, tensor_parallel=2)
    )
    model, other = load_checkpoint(path).model, make_model(seed=8)
    checksums = engine.proof.checksum == checksum(flatten(model))
    requests = make_requests([5, 18, 9, 33])
    asked = [
        Decoding(block_size=4, max_new_tokens=24, stop_ids=(7, 11), threshold=0.12),
        Decoding(block_size=16, max_new_tokens=40, stop_ids=(), temperature=0.0, strategy="static", denoising_steps=5),
        Decoding(block_size=8, max_new_tokens=24, stop_ids=(), top_p=0.8, temperature=0.9, threshold=0.2),
    ]
    tokens = all(same(engine.generate(requests, d), TorchEngine(model).generate(requests, d)) for d in asked)
    short = [replace(r, max_new_tokens=n) for r, n in zip(requests, (27, 40, 40, 40), strict=True)]
    stream = engine.stream(short, replace(asked[1], max_new_tokens=40))
    next(stream)
    proof = engine.load_weights(flatten(other), 1)
    in_flight = {int(v) for t in stream for v in t.weight_versions} == {0, 1}
    checksums &= (proof.version, proof.checksum) == (1, checksum(flatten(other)))
    updated = all(same(engine.generate(requests, d), TorchEngine(other).generate(requests, d)) for d in asked)
    alive = not engine.broken
    found = {"checksums": checksums, "tokens": tokens, "updated": updated, "in_flight": in_flight, "alive": alive}
    print(json.dumps(found), flush=True)
    worker = RolloutWorker(0, None, None, threads=1, weights=None)
    worker._engine = engine
    os.kill(engine._core.engine_core.model_executor.workers[1].proc.pid, signal.SIGKILL)
    try:
        worker.generate(requests, asked[0], 1)
    finally:
        print("null", flush=True)  # nothing comes here


if __name__ == "__main__":
    main(sys.argv[1])
