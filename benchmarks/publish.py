"""What it takes to publish new weights to rollout actors, by phase, against one call for each parameter; prints JSON.

    python -m benchmarks.publish [--model 20M] [--actors 4] [--repeats 7] [--out FILE]

    ours        flatten ► checksum ► store ► [fetch ► load ► checksum] in every actor at once ► proofs
    baseline    for each parameter: store it, one call to every actor, wait for all        (as OpenRLHF does it)
    pipelined   the same calls, waiting once at the end

Every way ends with the same check: all actors serve the learner's bits. Engines are idle; real Ray, real engines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.torch_engine import TorchEngine
from benchmarks.shapes import add_model_arguments, make_model
from cluster.session import connect
from cluster.weights import ObjectStoreTransport, Published
from tstar_ray.config import ClusterConfig
from tstar_ray.model import BlockDiffusionLM
from tstar_ray.weights import Proof, checksum, checksum_parts, flatten, load_flat


class Receiver:
    """An engine with random weights."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._model = make_model(arguments)
        self._engine = TorchEngine(self._model)
        self._parameters = dict(self._model.named_parameters())

    def load(self, published: Published) -> tuple[Proof, float]:
        """As a rollout actor; with the seconds of fetching."""
        start = time.perf_counter()
        flat = ObjectStoreTransport().fetch(published)
        return self._engine.load_weights(flat, published.version), time.perf_counter() - start

    def phases(self, published: Published) -> dict[str, float]:
        """The same work in its parts, alone on the machine."""
        start = time.perf_counter()
        flat = ObjectStoreTransport().fetch(published)
        fetched = time.perf_counter()
        load_flat(self._model, flat)
        loaded = time.perf_counter()
        checksum_parts(self._model.parameters())
        return {"fetch": fetched - start, "load": loaded - fetched, "checksum": time.perf_counter() - loaded}

    @torch.no_grad()
    def take(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """One parameter."""
        self._parameters[name].copy_(torch.from_numpy(array))

    def serves(self) -> str:
        """Checksum of what is loaded."""
        return checksum_parts(self._model.parameters())


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(model="20M")
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7, help="the first of them is left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with connect(ClusterConfig(), namespace=f"publish-{os.getpid()}"):
        receiver = ray.remote(Receiver)
        actors = [receiver.options(num_cpus=0).remote(arguments) for _ in range(arguments.actors)]
        ray.get([a.serves.remote() for a in actors])
        model = make_model(arguments)
        buffer = flatten(model)
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for version in range(arguments.repeats):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3)
            for name, took in {**_publish(model, buffer, actors, version), **_by_parameter(model, actors)}.items():
                seconds[name].append(took)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    found = {
        "benchmark": "publish",
        "machine": platform.node(),
        "cores": os.cpu_count(),
        "model": arguments.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "actors": arguments.actors,
        "seconds": medians,
        "baseline_over_ours": medians["by_parameter"] / medians["total"],
        "pipelined_over_ours": medians["by_parameter_pipelined"] / medians["total"],
    }
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def _publish(model: BlockDiffusionLM, buffer: torch.Tensor, actors: list[Any], version: int) -> dict[str, float]:
    import ray

    start = time.perf_counter()
    flat = flatten(model, buffer)
    flattened = time.perf_counter()
    published = ObjectStoreTransport().publish(flat, version)
    stored = time.perf_counter()
    answers = ray.get([a.load.remote(published) for a in actors])
    end = time.perf_counter()
    assert all(proof == published.proof for proof, _ in answers)
    alone = ray.get(actors[0].phases.remote(published))
    before = time.perf_counter()
    checksum(flat)
    summed = time.perf_counter() - before
    return {
        "total": end - start,
        "flatten": flattened - start,
        "checksum": summed,
        "store": stored - flattened - summed,
        "all_actors": end - stored,
        **{f"one_actor_{phase}": took for phase, took in alone.items()},
    }


def _by_parameter(model: BlockDiffusionLM, actors: list[Any]) -> dict[str, float]:
    import ray

    took = {}
    for name, waits in (("by_parameter", True), ("by_parameter_pipelined", False)):
        start, calls = time.perf_counter(), []
        for parameter_name, parameter in model.named_parameters():
            reference = ray.put(parameter.detach().numpy())
            calls += [a.take.remote(parameter_name, reference) for a in actors]
            if waits:
                ray.get(calls)
                calls = []
        ray.get(calls)
        expected = checksum_parts(model.parameters())
        served = ray.get([a.serves.remote() for a in actors])
        took[name] = time.perf_counter() - start
        assert set(served) == {expected}
    return took


if __name__ == "__main__":
    main()
