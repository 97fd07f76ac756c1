"""What a recorded pass asks a GPU to do, without one: kernels, bytes and arithmetic; prints JSON.

    python -m benchmarks.launches [--model sdar-4b] [--rows 128] [--block 4] [--keys 320] [--out FILE]

The pass runs on PyTorch's ``meta`` device, where every operation is seen and nothing is computed. All rows denoise, or
all commit a block as well; ``even`` as in a static schedule, or padded in attention. ``modules`` is the same pass
through transformers' modules, ``decoder`` the engine's own, ``kernels`` that with actors.kernels. An operation that is
no view counts as one kernel and moves its operands and results once; of what it only indexes, what it takes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors.decoder import Decoder
from actors.kv_cache import FixedLayout, FixedTensors, FusedLayout, KVCache
from benchmarks.shapes import SHAPES, random_model
from tstar_ray.model import Layout

META = torch.device("meta")


class Launches(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        found = func(*args, **(kwargs or {}))
        results = found if isinstance(found, (tuple, list)) else [found]
        if not func._schema.is_mutable and _same_memory(args[0], results[0]):
            return found
        self.kernels[name] += 1
        if name in ("index", "index_select", "embedding"):
            self.bytes += 2 * found.nbytes
        elif name == "index_put_":
            self.bytes += 2 * args[2].nbytes
        elif name == "store_":
            self.bytes += 2 * (args[2].nbytes + args[3].nbytes)
        else:
            results = [args[0]] if found is None else results
            self.bytes += sum(_held(x) for x in (*args, *(kwargs or {}).values(), *results))
        if name in ("linear", "addmm_"):
            x, weight = args[:2] if name == "linear" else args[1:3]
            self.operations += 2 * weight.numel() * (x.numel() // x.shape[-1])
        return found


def _same_memory(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _held(x: Any) -> int:
    """Bytes of a tensor's memory, whose expanded dimensions hold nothing; of a list of tensors, of all."""
    if isinstance(x, (tuple, list)):
        return sum(_held(item) for item in x)
    if not isinstance(x, torch.Tensor):
        return 0
    return x.itemsize * torch.Size([n for n, stride in zip(x.shape, x.stride()) if stride]).numel()


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdar-4b", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--keys", type=int, default=320)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args(argv)
    results = [
        measure(arguments, layers=layers, commits=commits, even=even)
        for commits in (False, True)
        for layers in ("modules", "decoder", "kernels")
        for even in (False, True)
    ]
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    text = json.dumps(
        {"benchmark": "launches", "torch": torch.__version__, "settings": settings, "results": results}, indent=1
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


@torch.inference_mode()
def measure(arguments: argparse.Namespace, *, layers: str, commits: bool, even: bool) -> dict[str, Any]:
    """One pass up to the final hidden states; LM head and draw are not recorded."""
    model = random_model(SHAPES[arguments.model], device=META, dtype=torch.bfloat16, seed=0)
    rows, queries = arguments.rows, arguments.block * (2 if commits else 1)
    cache = KVCache(model.hf.config, dtype=model.dtype, device=META)
    decoder = Decoder(model, fused=layers == "kernels")
    cache.resize(rows, arguments.keys, kept=0)
    tokens = torch.empty(rows * queries, dtype=torch.long, device=META)
    at = FixedTensors(tokens, tokens, None if even else tokens, tokens.view(rows, queries))
    with Launches() as seen:
        layout: Layout
        if decoder.fused:
            layout = FusedLayout(cache, at)
        else:
            layout = FixedLayout(cache, at, groups=decoder.groups, keys=arguments.keys, small=False)
        if layers == "modules":
            model.hidden(tokens[None], tokens[None], layout)
        else:
            decoder.hidden(tokens, tokens, layout)
    return {
        "pass": "commit and denoise" if commits else "denoise",
        "layers": layers,
        "even": even,
        "kernels": seen.kernels.total(),
        "gib": seen.bytes / 2**30,
        "tflop": seen.operations / 1e12,
        "most": dict(seen.kernels.most_common(8)),
    }


if __name__ == "__main__":
    main()
