"""Does the engine, and does the learner's mathematics, do on this device what they do on paper? Prints JSON.

    python -m benchmarks.checks [--device cuda] [--out FILE]

Needs torch and transformers alone. On a small random model: the engine against benchmarks.plain_decoder, the
learner's layout for the device against a dense bias (replayed log-probs and gradients), weights in flight, the engine's
again with CUDA graphs and, on a GPU, with its Triton kernels in them, and what bf16 costs. Exits with 1 if a bound is
exceeded or a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from actors.torch_engine import TorchEngine
from benchmarks import plain_decoder
from benchmarks.shapes import device_name, make_requests, random_model
from learner.layout import WIDTH_MULTIPLE, make_layout
from learner.packing import MicroBatch, pack, slice_sample, token_weights
from tstar_ray.blocks import train_visibility
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM, TrainLayout
from tstar_ray.trajectory import Request, Trajectory
from tstar_ray.weights import flatten

SHAPE = (128, 3, 4, 2, 32, 256, 2048)
RULES = [
    Decoding(block_size=4, max_new_tokens=48, stop_ids=(7,), threshold=0.3),
    Decoding(block_size=16, max_new_tokens=64, stop_ids=(), strategy="static", denoising_steps=6),
    Decoding(block_size=8, max_new_tokens=48, stop_ids=(), strategy="entropy", entropy_bound=4.0, temperature=0.7),
    Decoding(block_size=32, max_new_tokens=64, stop_ids=(), temperature=0.0),
]
WAYS: dict[str, dict[str, bool]] = {
    "": {},
    "_with_graphs": {"cuda_graphs": True},
    "_with_kernels": {"cuda_graphs": True, "triton_kernels": True},
}
"""Settings of the engine; those of the last need a GPU."""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(arguments.device)
    model, rough = (
        random_model(SHAPE, device=device, dtype=dtype, seed=0) for dtype in (torch.float32, torch.bfloat16)
    )
    results = {name: run(bound, check) for name, (bound, check) in all_checks(model, rough).items()}
    failed = [name for name, result in results.items() if not result["holds"]]
    text = json.dumps(
        {
            "benchmark": "checks",
            "device": device_name(arguments.device),
            "torch": torch.__version__,
            "results": results,
            "failed": failed,
        },
        indent=1,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(bool(failed))


def all_checks(model: BlockDiffusionLM, rough: BlockDiffusionLM) -> dict[str, tuple[float, Callable[[], float]]]:
    """Of each the largest number that will do, and what computes it. ``rough`` is the model in bf16.

    fp32 on CUDA adds up in another order than a dense bias does, through tiles and split reductions.
    """
    checks: dict[str, tuple[float, Callable[[], float]]] = {
        "gradient_fp32": (1e-3, partial(gradient_difference, model))
    }
    for way, settings in WAYS.items():
        if "triton_kernels" not in settings or model.device.type == "cuda":
            checks |= {
                f"tokens_that_differ{way}": (0, partial(tokens_that_differ, model, **settings)),
                f"tokens_that_differ_in_flight{way}": (0, partial(tokens_that_differ_in_flight, model, **settings)),
                f"replay_fp32{way}": (1e-3, lambda settings=settings: float(replay(model, **settings).max())),
                f"replay_bf16_mean{way}": (0.05, lambda settings=settings: float(replay(rough, **settings).mean())),
            }
    return checks


def run(bound: float, check: Callable[[], float]) -> dict[str, float | str | bool]:
    """What it found, or the error that it ended with."""
    try:
        found = check()
    except Exception:
        return {"error": traceback.format_exc(), "bound": bound, "holds": False}
    return {"found": found, "bound": bound, "holds": found <= bound}


def requests_for(model: BlockDiffusionLM, count: int = 6) -> list[Request]:
    """Prompts of 5 to 80 tokens."""
    return make_requests(model, np.linspace(5, 80, count).astype(int).tolist(), seed=1)


def tokens_that_differ(model: BlockDiffusionLM, **settings: bool) -> int:
    """Between the engine, all rules decoding together, and the plain decoder; all of them where graphs are wanted and
    no pass was one."""
    engine, requests = TorchEngine(model, **settings), requests_for(model)  # type: ignore[arg-type]
    streams = [engine.stream(requests, rule) for rule in RULES]
    differ = tokens = 0
    for rule, stream in zip(RULES, streams):
        for trajectory in stream:
            ids, steps, *_ = plain_decoder.decode(model, requests[trajectory.group_id], rule)
            same = len(ids) == len(trajectory.token_ids) and steps == trajectory.step_map.tolist()
            differ += int((trajectory.token_ids != ids).sum()) if same else max(1, len(ids))
            tokens += len(ids)
    return tokens if "cuda_graphs" in settings and not engine.stats.graphed else differ


def _batches(model: BlockDiffusionLM, found: list[Trajectory], block_size: int) -> list[MicroBatch]:
    samples = [slice_sample(t, 1.0, block_size=block_size, mask_id=model.mask_id, shrink=1) for t in found]
    cuda = model.device.type == "cuda"
    return [
        batch.to(model.device)
        for batch in pack(
            samples,
            token_weights(samples, "token_mean", length_norm=1),
            row_tokens=2048 if cuda else 0,
            micro_batch_tokens=2048,
            width_multiple=WIDTH_MULTIPLE if cuda else 1,
        )
    ]


@torch.no_grad()
def replay(model: BlockDiffusionLM, **settings: bool) -> np.ndarray:
    """Distance of recorded from replayed log-probs, every token of every rule."""
    errors = []
    for rule in RULES:
        found = TorchEngine(model, **settings).generate(requests_for(model), rule)  # type: ignore[arg-type]
        for batch in _batches(model, found, rule.block_size):
            layout = make_layout(batch, model.dtype)
            new, _ = model(batch.ids, batch.positions, layout, batch.index, batch.targets, rule.temperature or 1.0)
            errors.append((new - batch.recorded).abs())
    return torch.cat(errors).float().cpu().numpy()


def gradient_difference(model: BlockDiffusionLM) -> float:
    """Relative, between the layout of this device and a dense bias."""
    found = TorchEngine(model).generate(requests_for(model), RULES[1])
    gradients = []
    for dense in (False, True):
        model.zero_grad()
        for batch in _batches(model, found, RULES[1].block_size):
            layout = (
                TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), model.dtype)
                if dense
                else make_layout(batch, model.dtype)
            )
            new, _ = model(batch.ids, batch.positions, layout, batch.index, batch.targets)
            (new * batch.weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    model.zero_grad()
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def tokens_that_differ_in_flight(model: BlockDiffusionLM, **settings: bool) -> int:
    """Where the same weights come under a new version in mid-sequence; all where no sequence met it."""
    requests, rule = requests_for(model), replace(RULES[0], stop_ids=())
    expected = TorchEngine(model).generate(requests, rule)
    differ = 0
    for policy in ("recompute", "keep"):
        engine = TorchEngine(model, cache_update=policy, **settings)  # type: ignore[arg-type]
        stream = engine.stream([replace(r, max_new_tokens=8 * i + 8) for i, r in enumerate(requests)], rule)
        found = [next(stream)]
        engine.load_weights(flatten(model), 1)
        found += stream
        met = any(1 in t.weight_versions for t in found)
        for trajectory in found:
            ids, whole = trajectory.token_ids, expected[trajectory.group_id].token_ids
            differ += int((ids != whole[: len(ids)]).sum()) if met else len(ids)
    return differ


if __name__ == "__main__":
    main()
