"""A trainer broadcasts weights to an engine in another process; run by test_vllm_weights.py.

this process: model, GlooSender ──gloo──► child process: VllmEngine, with a sequence under way
"""

import json
import multiprocessing
import socket
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import torch
from synthetic import make_model, make_requests

from actors.torch_engine import TorchEngine
from actors.vllm_engine import VllmEngine
from actors.vllm_serving import Serving
from tstar_ray.decoding import Decoding
from tstar_ray.model import read_blueprint

DECODING = Decoding(block_size=8, max_new_tokens=160, stop_ids=(), threshold=0.12)
_engine, _found = None, []


def start(path):
    """In the child: an engine that decodes."""
    global _engine
    torch.set_num_threads(1)
    _engine = VllmEngine(
        read_blueprint(path), Serving(max_block=8, max_tokens=200, max_batch=4, cache_gb=2**-6, weight_transfer=True)
    )
    return True


def decode_meanwhile():
    stream = _engine.stream(make_requests([12]), DECODING)
    thread = threading.Thread(target=lambda: _found.extend(stream), daemon=True)
    thread.start()
    while _engine.stats.passes < 20:
        thread.join(0.01)
    return True


def call(method, *arguments):
    return getattr(_engine, method)(*arguments)


def finish():
    """In the child: versions of what was under way, and tokens decoded afterwards."""
    while not _found:
        threading.Event().wait(0.05)
    later = _engine.generate(make_requests([7]), DECODING)[0]
    return sorted({int(v) for v in _found[0].weight_versions}), later.token_ids.tolist(), _engine.proof


class Client:
    """The four calls that vLLM's trainers make, to the engine in the child."""

    def __init__(self, pool):
        self.pool, self.version = pool, 0

    def init_weight_transfer_engine(self, info):
        self.pool.submit(call, "join_transfer", info).result()

    def start_weight_update(self):
        self.version += 1

    def update_weights(self, info):
        self.pool.submit(call, "receive_weights", info, self.version).result()

    def finish_weight_update(self, weight_version=None):
        pass


def main(path):
    torch.set_num_threads(1)
    from vllm.distributed.weight_transfer.base import ModuleSource

    from actors.vllm_plugin.gloo import GlooSender, GlooSenderInit

    other = make_model(seed=8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(start, path).result()
        info = GlooSenderInit(master_address="127.0.0.1", master_port=port, world_size=2, rank=0)
        sender = GlooSender.trainer_init(info, client=Client(pool), source=ModuleSource(other.hf))
        assert pool.submit(decode_meanwhile).result()
        sender.send_weights()
        versions, tokens, proof = pool.submit(finish).result()
    expected = TorchEngine(other).generate(make_requests([7]), DECODING)[0].token_ids.tolist()
    print(json.dumps({"versions": versions, "tokens": tokens == expected, "checksum": proof.checksum}))


if __name__ == "__main__":
    main(sys.argv[1])
