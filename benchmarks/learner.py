"""Cost of a TraceRL gradient: ragged slice packing against the published scheme; prints JSON.

    python -m benchmarks.learner [--model 8M] [--device cpu] [--blocks 4 8 16 32] [--out FILE]

`packed` is this project's learner (learner.packing, learner.layout, LM head at targets only). `dense` is the
scheme of Gen-Verse/dLLM-RL (algorithm reference 2.5, 2.6), written plainly: one row for each slice round over the
whole sequence, [prompt | clean answer | noisy answer] under a dense mask, one row a pass, logits at every prompt
and noisy position, all rows padded to the longest prompt and the longest answer of the batch, as published;
`dense_tight` is the same without padding. All checkpoint activations, as the published configuration does, and
all compute the same gradient; `gradient_difference` shows it. None spends a pass on old log-probs (the published
code does).

Every case runs in a process of its own, the schemes in turn, so that a machine that others use slows all of them; the
fastest of ``--repeats`` counts. Memory is the most that the gradient holds beside the resident model and its
gradients, counted by the allocator: on CPU by PyTorch's profiler in a second pass that is not timed, since what a
process has resident depends on what malloc keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F

from benchmarks.shapes import PUBLISHED_TPF, add_model_arguments, device_name, make_model, make_traces
from learner.layout import WIDTH_MULTIPLE, make_layout
from learner.objective import token_terms
from learner.packing import pack, slice_sample, token_weights
from tstar_ray.blocks import build_slices
from tstar_ray.model import BlockDiffusionLM, TrainLayout
from tstar_ray.trajectory import Trajectory, tokens_per_forward

CLIP = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.01}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--samples", type=int, default=8, help="trajectories a block size")
    parser.add_argument("--prompt", type=int, default=96, help="mean prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--row-tokens", type=int, default=0)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="of each scheme; the fastest counts")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, for its share (H200, bf16)")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--case", nargs=2, metavar=("SCHEME", "TRACES"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments, arguments.case[0], Path(arguments.case[1]))))
        return
    text = json.dumps(compare(arguments), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def compare(arguments: argparse.Namespace) -> dict:
    """All block sizes under both schemes."""
    model = make_model(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for block in arguments.blocks:
            traces = make_traces(
                model,
                block,
                count=arguments.samples,
                prompt=arguments.prompt,
                new_tokens=arguments.new_tokens,
                tpf=PUBLISHED_TPF[block],
                seed=arguments.seed,
            )
            (Path(folder) / f"{block}.pickle").write_bytes(pickle.dumps(traces))
            steps = [len(np.unique(part)) for t in traces for part in _blocks(t)]
            rows.append(
                {
                    "block_size": block,
                    "tpf": tokens_per_forward(traces, commits=False),
                    "steps_per_block": {"mean": float(np.mean(steps)), "max": max(steps)},
                }
            )
        if arguments.device.startswith("cuda"):
            del model
            torch.cuda.empty_cache()
        for row in rows:
            for repeat, scheme in itertools.product(range(arguments.repeats), ("dense", "dense_tight", "packed")):
                command = [sys.executable, "-m", "benchmarks.learner", *sys.argv[1:]]
                command += ["--case", scheme, str(Path(folder) / f"{row['block_size']}.pickle")]
                command += ["--memory"] if repeat == 0 else []
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                if found["seconds"] < row.setdefault(scheme, found)["seconds"]:
                    row[scheme] |= found
            dense, packed = row["dense"], row["packed"]
            gradients = [np.array(scheme.pop("gradient")) for scheme in (dense, packed, row["dense_tight"])]
            row["gradient_difference"] = float(
                np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[0])
            )
            row["times_faster_than_tight"] = row["dense_tight"]["seconds"] / packed["seconds"]
            row["times_faster"] = dense["seconds"] / packed["seconds"]
            row["memory_share"] = packed["peak_mb"] / dense["peak_mb"]
            print(
                f"B={row['block_size']}: {row['times_faster']:.1f}x faster, memory {row['memory_share']:.2f}",
                file=sys.stderr,
            )
    growth = {scheme: rows[-1][scheme]["seconds"] / rows[0][scheme]["seconds"] for scheme in ("dense", "packed")}
    return {
        "benchmark": "learner",
        "device": device_name(arguments.device),
        "model": arguments.model,
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("case", "memory", "out")},
        "per": "trajectory",
        "results": rows,
        "time_growth_from_first_to_last_block": growth,
    }


def _blocks(trajectory: Trajectory) -> list[np.ndarray]:
    """Step ids of each decoded block."""
    position = trajectory.prompt_len + np.arange(len(trajectory.step_map))
    return np.split(trajectory.step_map, np.flatnonzero(np.diff(position // trajectory.block_size)) + 1)


def measure(arguments: argparse.Namespace, scheme: str, traces: Path) -> dict:
    """Seconds, tokens and peak memory a trajectory for one gradient over all trajectories."""
    model = make_model(arguments).train()
    model.checkpoint_activations()
    trajectories: list[Trajectory] = pickle.loads(traces.read_bytes())
    run = {
        "dense": functools.partial(dense_gradient, padded=True),
        "dense_tight": functools.partial(dense_gradient, padded=False),
        "packed": packed_gradient,
    }[scheme]
    cuda = arguments.device.startswith("cuda")
    # Kernels are compiled and chosen, and libraries take their workspaces, before anything is measured.
    run(model, trajectories if cuda else [shortest(trajectories)], arguments)
    for parameter in model.parameters():
        parameter.grad.zero_()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    tokens = run(model, trajectories, arguments)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds / len(trajectories),
        "forwarded_tokens": tokens / len(trajectories),
        # Enough of the gradient to compare schemes by.
        "gradient": model.hf.model.layers[0].self_attn.q_proj.weight.grad.float().flatten()[:4096].cpu().tolist(),
    }
    if arguments.memory and not cuda:
        result["peak_mb"] = peak_bytes(lambda: run(model, trajectories, arguments)) / 2**20
    if cuda:
        result["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        layers = model.hf.model.layers
        work = sum(p.numel() for p in layers.parameters()) * tokens
        if scheme == "packed":  # the last MLP sees targets only
            idle = tokens - sum(t.completion_len for t in trajectories)
            work -= sum(p.numel() for p in layers[-1].mlp.parameters()) * idle
        result["flops_share"] = 8 * work / seconds / (arguments.peak_tflops * 1e12)  # 2 + 4, and 2 again
    return result


def shortest(trajectories: Sequence[Trajectory]) -> Trajectory:
    """One trajectory cut down to its first block."""
    t = min(trajectories, key=lambda t: t.prompt_len)
    end = t.prompt_len // t.block_size * t.block_size + t.block_size
    kept = end - t.prompt_len
    return dataclasses.replace(
        t,
        token_ids=t.token_ids[:end],
        completion_len=kept,
        step_map=t.step_map[:kept],
        logprobs=t.logprobs[:kept],
        weight_versions=t.weight_versions[:1],
    )


def packed_gradient(model: BlockDiffusionLM, trajectories: Sequence[Trajectory], arguments: argparse.Namespace) -> int:
    """As learner.trainer does it; returns tokens forwarded."""
    samples = [slice_sample(t, 1.0, block_size=t.block_size, mask_id=model.mask_id, shrink=1) for t in trajectories]
    batches = pack(
        samples,
        token_weights(samples, "token_mean", length_norm=1),
        row_tokens=arguments.row_tokens or (arguments.micro_batch_tokens if model.device.type == "cuda" else 0),
        micro_batch_tokens=arguments.micro_batch_tokens,
        width_multiple=WIDTH_MULTIPLE if model.device.type == "cuda" else 1,
    )
    for batch in (b.to(model.device) for b in batches):
        new, _ = model(batch.ids, batch.positions, make_layout(batch, model.dtype), batch.index, batch.targets)
        terms = token_terms(new, new.detach(), batch.advantage, **CLIP)
        (batch.weight * terms.loss).sum().backward()
    return sum(b.tokens for b in batches)


def dense_gradient(
    model: BlockDiffusionLM, trajectories: Sequence[Trajectory], arguments: argparse.Namespace, *, padded: bool
) -> int:
    """One row for each slice round: the r-th slice of every block that has one; returns tokens forwarded."""
    total = sum(t.completion_len for t in trajectories)
    forwarded = 0
    starts = [t.prompt_len // t.block_size * t.block_size for t in trajectories]
    widest = max(starts), max(len(t.token_ids) - start for t, start in zip(trajectories, starts))
    for trajectory in trajectories:
        block_size, prompt = trajectory.block_size, trajectory.prompt_len
        slices = build_slices(
            token_ids=trajectory.token_ids,
            step_map=trajectory.step_map,
            prompt_len=prompt,
            completion_len=trajectory.completion_len,
            block_size=block_size,
            mask_id=model.mask_id,
        )
        # Answers start at the grid line of the first decoded block, so that its prompt tail is part of it.
        start = prompt // block_size * block_size
        clean = torch.from_numpy(trajectory.token_ids.astype(np.int64)).to(model.device)
        length = len(clean)
        position = torch.cat([torch.arange(length), torch.arange(start, length)]).to(model.device)
        # Padding of the prompt and of both copies of the answer stands at the end; each sees itself alone.
        extra = (widest[0] - start + widest[1] - (length - start), widest[1] - (length - start)) if padded else (0, 0)
        padding = torch.zeros(sum(extra), dtype=torch.long, device=model.device)
        position = torch.cat([position, padding])
        block = position // block_size
        is_padding = torch.arange(len(position), device=model.device) >= len(position) - len(padding)
        noisy_copy = torch.arange(len(position), device=model.device) >= length
        earlier = block[None, :] < block[:, None]
        same = block[None, :] == block[:, None]
        visible = torch.where(
            noisy_copy[:, None],
            (~noisy_copy[None, :] & earlier) | (noisy_copy[None, :] & same),
            ~noisy_copy[None, :] & (earlier | same),
        ) & ~(is_padding[:, None] | is_padding[None, :])
        visible |= torch.eye(len(position), dtype=torch.bool, device=model.device)
        layout = TrainLayout(visible[None], model.dtype)
        rank = np.concatenate([np.arange(n) for n in np.unique(slices.block, return_counts=True)[1]])
        for round_ in range(int(rank.max()) + 1):
            noisy, targets = clean[start:].clone(), torch.zeros(length - start, dtype=torch.bool, device=model.device)
            for i in np.flatnonzero(rank == round_):
                span = slice(slices.block[i] * block_size - start, (slices.block[i] + 1) * block_size - start)
                noisy[span] = torch.from_numpy(slices.noisy[i]).to(model.device)
                targets[span] = torch.from_numpy(slices.target[i]).to(model.device)
            hidden = model.hidden(torch.cat([clean, noisy, padding])[None], position[None], layout)[0]
            # Logits at the prompt and at the noisy copy, with the padding of both.
            used = torch.cat([hidden[:start], hidden[length : len(position) - extra[1]]])
            labels = torch.cat([clean, padding[: extra[0]]])
            every = F.log_softmax(model.logits(used).float(), dim=-1)
            logprobs = every.gather(-1, labels[:, None]).squeeze(-1)[start:length]
            terms = token_terms(logprobs, logprobs.detach(), torch.ones_like(logprobs), **CLIP)
            (terms.loss[targets].sum() / total).backward()
            forwarded += len(position)
    return forwarded


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of host memory that PyTorch held at a time during ``work``, beyond those it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.device_type() == DeviceType.CPU]
    return max(0, *itertools.accumulate(changes))


if __name__ == "__main__":
    main()
