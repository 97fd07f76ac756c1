"""Rollout throughput: the engine against plain decoding and against static batching; prints JSON.

    python -m benchmarks.rollout [--model 8M] [--device cpu] [--blocks 4 16] [--schedules static dynamic] [--out FILE]

``plain`` is benchmarks.plain_decoder, one sequence at a time with separate commits, on ``--plain-prompts`` requests
whose lengths are spread as those of all are. On two idle cores the defaults take about ten minutes.
``static`` is static batching in the usual sense: ``--max-batch`` requests at a time, every row computed until the
longest of them has ended. ``shrinking`` is this engine given as many at a time: rows that ended leave the pass, but
nobody takes their place. ``continuous`` is this engine given everything at once. ``--engine vllm`` adds ``vllm``, the
vLLM engine given everything at once (in the environment of ``./tstar vllm``). All decode the same requests by the same
rules.

Answer lengths are caps of the single requests, since a model of random weights does not know when to stop: all
``--new-tokens``, or those of real GSM8K solutions (``--lengths`` a JSONL file with a ``solution`` in every line,
counted in words, digits and signs), or else log-normal with the median and spread of GSM8K's.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from actors.engine import Engine, EngineStats
from actors.kv_cache import head_dim
from actors.torch_engine import TorchEngine
from benchmarks import plain_decoder
from benchmarks.shapes import PUBLISHED_TPF, add_model_arguments, device_name, make_model, make_requests, tuned_decoding
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM
from tstar_ray.model_files import Blueprint
from tstar_ray.trajectory import Request


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--schedules", nargs="+", choices=["static", "dynamic"], default=["static", "dynamic"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=96, help="mean prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--lengths", default="lognormal", help="fixed, lognormal, or a file of solutions")
    parser.add_argument("--max-batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--plain-prompts", type=int, default=16, help="decoded by the plain decoder")
    parser.add_argument("--repeats", type=int, default=3, help="of each; the median counts")
    parser.add_argument("--steps", type=int, help="denoising steps a block of the static schedule; default B")
    parser.add_argument("--only-engine", action="store_true", help="continuous batching alone")
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch", help="vllm: measure that one too")
    parser.add_argument("--cache-gb", type=float, default=4.0)
    parser.add_argument("--cuda-graphs", action="store_true", help="continuous batching with actors.cuda_graphs too")
    parser.add_argument("--triton-kernels", action="store_true", help="and with actors.triton_kernels (needs a GPU)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, for its share (H200, bf16)")
    parser.add_argument("--peak-gbps", type=float, default=4800.0, help="of its memory (H200)")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args(argv)
    model = make_model(arguments)
    rows = [compare(model, arguments, b, schedule) for schedule in arguments.schedules for b in arguments.blocks]
    text = json.dumps(
        {
            "benchmark": "rollout",
            "device": device_name(arguments.device),
            "model": arguments.model,
            "torch": torch.__version__,
            "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
            "results": rows,
        },
        indent=1,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def compare(model: BlockDiffusionLM, arguments: argparse.Namespace, block: int, schedule: str) -> dict:
    """One block size under one schedule."""
    requests = with_lengths(model, arguments)
    if schedule == "static":
        cap = arguments.new_tokens
        decoding = Decoding(
            block_size=block,
            max_new_tokens=cap,
            stop_ids=(),
            strategy="static",
            denoising_steps=arguments.steps and min(arguments.steps, block),
        )
    else:
        decoding = tuned_decoding(model, block, arguments.new_tokens, PUBLISHED_TPF[block])
    few = spread(requests, arguments.plain_prompts)
    TorchEngine(model).generate(few[:1], decoding)  # libraries take their workspaces
    cache_gb = arguments.cache_gb

    def median(run: Callable[[], dict]) -> dict:
        runs = sorted((run() for _ in range(arguments.repeats)), key=lambda r: r["tokens_per_s"])
        return runs[len(runs) // 2]

    found: dict = {"schedule": schedule, "block_size": block, "engine": []}
    if not arguments.only_engine:
        found["plain"] = median(lambda: measure_plain(model, few, decoding))
    for size in arguments.max_batch:
        engine = functools.partial(
            measure, model, requests, decoding, lambda size=size: TorchEngine(model, max_batch=size, cache_gb=cache_gb)
        )
        row: dict = {"max_batch": size, "continuous": median(functools.partial(engine, at_once=len(requests)))}
        others = {}
        recorded = ["graphs"] * arguments.cuda_graphs + ["kernels"] * arguments.triton_kernels
        for name in recorded:
            made = TorchEngine(
                model, max_batch=size, cache_gb=cache_gb, cuda_graphs=True, triton_kernels=name == "kernels"
            )
            again = functools.partial(measure, model, requests, decoding, lambda e=made: e, at_once=len(requests))
            again()  # shapes are recorded
            row[name] = median(again)
            row[f"{name}_times_faster"] = row[name]["tokens_per_s"] / row["continuous"]["tokens_per_s"]
            made.sleep()
        if not arguments.only_engine:
            row["static"] = median(functools.partial(engine, at_once=size, to_the_longest=True))
            row["shrinking"] = median(functools.partial(engine, at_once=size))
            others = {"plain": found["plain"], "static": row["static"], "shrinking": row["shrinking"]}
        if model.device.type == "cuda":
            for run in (row["continuous"], *(row[name] for name in recorded)):
                run["roofline"] = roofline(model, requests, run, arguments)
        if arguments.engine == "vllm":
            with served_by_vllm(model, block, size, arguments) as vllm:
                warm = replace(decoding, max_new_tokens=2 * block)
                vllm.generate([replace(few[0], max_new_tokens=None)], warm)
                row["vllm"] = median(lambda: measure(model, requests, decoding, lambda: vllm, at_once=len(requests)))
            row["vllm_times_faster_than_continuous"] = row["vllm"]["tokens_per_s"] / row["continuous"]["tokens_per_s"]
            print(f"vLLM: {row['vllm_times_faster_than_continuous']:.2f}x the torch engine", file=sys.stderr)
        speed = row["continuous"]["tokens_per_s"]
        row |= {f"times_faster_than_{name}": speed / other["tokens_per_s"] for name, other in others.items()}
        ratios = ", ".join(f"{row[f'times_faster_than_{name}']:.2f}x {name}" for name in others)
        print(f"{schedule} B={block}, batch {size}: {speed:.0f} tokens/s, {ratios}", file=sys.stderr)
        found["engine"].append(row)
    return found


@contextmanager
def served_by_vllm(
    model: BlockDiffusionLM, block: int, max_batch: int, arguments: argparse.Namespace
) -> Iterator[Engine]:
    """The same weights in vLLM."""
    from actors.vllm_engine import VllmEngine
    from actors.vllm_serving import Serving

    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        blueprint = Blueprint(
            path=folder,
            model_type=model.hf.config.model_type,
            mask_id=model.mask_id,
            token_limit=int((~model.suppressed_V).nonzero().max()) + 1,
            max_positions=model.hf.config.max_position_embeddings,
            layout=tuple((name, tuple(p.shape)) for name, p in model.hf.named_parameters()),
        )
        serving = Serving(
            max_block=block,
            max_tokens=arguments.prompt * 3 // 2 + arguments.new_tokens,
            max_batch=max_batch,
            cache_gb=arguments.cache_gb,
            device=model.device.type,
            dtype=model.dtype,
            prefix_caching=False,
        )
        engine = VllmEngine(blueprint, serving)
        try:
            yield engine
        finally:
            engine.close()


def with_lengths(model: BlockDiffusionLM, arguments: argparse.Namespace) -> list[Request]:
    """Requests with random prompts, and caps as ``--lengths`` says."""
    rng = np.random.default_rng(arguments.seed)
    prompts = rng.integers(max(1, arguments.prompt // 2), arguments.prompt * 3 // 2, arguments.prompts).tolist()
    requests = make_requests(model, prompts, arguments.seed)
    if arguments.lengths == "fixed":
        return requests
    if arguments.lengths == "lognormal":
        lengths = rng.lognormal(np.log(71), 0.49, len(requests))
    else:
        lengths = rng.choice(solution_lengths(Path(arguments.lengths)), len(requests))
    caps = np.clip(lengths, 32, arguments.new_tokens).astype(int).tolist()
    return [replace(request, max_new_tokens=cap) for request, cap in zip(requests, caps)]


def spread(requests: Sequence[Request], count: int) -> list[Request]:
    """``count`` of the requests, the middle ones of as many equal parts in the order of their caps."""
    ordered = sorted(requests, key=lambda request: request.max_new_tokens or 0)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(min(count, len(ordered)))]


def solution_lengths(file: Path) -> list[int]:
    """Tokens, nearly, of every solution in a JSONL file."""
    solutions = [json.loads(line)["solution"] for line in file.read_text().splitlines()]
    # Calculator notes such as <<48/2=24>> are no part of what a model writes.
    return [len(re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", re.sub(r"<<.*?>>", "", text))) for text in solutions]


def measure_plain(model: BlockDiffusionLM, requests: Sequence[Request], decoding: Decoding) -> dict:
    """The plain decoder on ``requests``."""
    start = time.perf_counter()
    found = [plain_decoder.decode(model, request, decoding) for request in requests]
    seconds = time.perf_counter() - start
    tokens = sum(length for _, _, length, _ in found)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "forwards": sum(f for *_, f in found),
        "tokens": tokens,
        "mean_tokens": tokens / len(requests),
    }


def measure(
    model: BlockDiffusionLM,
    requests: Sequence[Request],
    decoding: Decoding,
    make_engine: Callable[[], Engine],
    *,
    at_once: int,
    to_the_longest: bool = False,
) -> dict:
    """The engine on ``requests``, ``at_once`` of them a call, each as long as it should be or as the longest of them.

    Tokens beyond a request's own length count for nothing.
    """
    engine = make_engine()
    before = asdict(engine.stats)
    start = time.perf_counter()
    tokens = 0
    for first in range(0, len(requests), at_once):
        batch = requests[first : first + at_once]
        if to_the_longest:
            own = [request.max_new_tokens or decoding.max_new_tokens for request in batch]
            found = engine.generate([replace(r, max_new_tokens=max(own)) for r in batch], decoding)
            tokens += sum(min(t.completion_len, cap) for t, cap in zip(found, own))
        else:
            tokens += sum(t.completion_len for t in engine.generate(batch, decoding))
    seconds = time.perf_counter() - start
    stats = EngineStats(**{name: value - before[name] for name, value in asdict(engine.stats).items()})
    return {
        **asdict(stats),
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "mean_tokens": tokens / len(requests),
        "occupancy": stats.occupancy,
        "steps_per_block": stats.steps_per_block,
        "tpf": stats.tokens_per_forward(commits=False),
        "tpf_with_commits": stats.tokens_per_forward(commits=True),
    }


def roofline(
    model: BlockDiffusionLM, requests: Sequence[Request], run: dict, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds that memory and arithmetic alone would take, and the share of the time taken.

    Memory: every pass reads the weights, and each of its sequences its keys and values. Arithmetic: two operations
    a weight and token, the LM head and the last MLP at masked positions only (half of a block's, on average).
    """
    config = model.hf.config
    size = model.dtype.itemsize
    body = sum(p.numel() for p in model.hf.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    length = float(np.mean([len(r.prompt_ids) for r in requests])) + run["tokens"] / len(requests) / 2
    read = run["forwards"] * (body + head) * size + run["sequence_steps"] * length * width * size
    last_mlp = sum(p.numel() for p in model.hf.model.layers[-1].mlp.parameters())
    work = (2 * body - last_mlp + head) * run["forwarded_tokens"]
    memory, arithmetic = read / (arguments.peak_gbps * 1e9), work / (arguments.peak_tflops * 1e12)
    return {
        "memory_s": memory,
        "arithmetic_s": arithmetic,
        "share": max(memory, arithmetic) / run["seconds"],
    }


if __name__ == "__main__":
    main()
