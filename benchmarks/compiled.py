"""What the kernels of actors.triton_kernels take on GPUs, compiled for them without one; prints JSON.

    python -m benchmarks.compiled [--model sdar-4b] [--capabilities 80 86 89 90 100] [--out FILE]

Needs Triton. The launches are the engine's own, in bf16 and in fp32; ``queries`` are those of a program of attention.
Whatever does not fit into a GPU's shared memory or registers is an error here as it is there. What ``stack`` counts was
spilled from registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from actors.decoder import Decoder
from actors.kv_cache import FixedTensors, FusedLayout, KVCache
from benchmarks.shapes import SHAPES, random_model

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that one program may take, by compute capability (CUDA C++ Programming Guide, 16.2)."""
_WARP = 32


class CompilingDriver:
    """Triton's driver of a GPU that is not there: it loads what is launched, and runs nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[dict[str, Any]] = []
        """Each kernel once, for each of its tiles."""
        self.utils = self

    def get_current_device(self) -> int:
        """One for each capability: Triton keeps what it compiled by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.capability, _WARP)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Launches a kernel that is about to be loaded: nothing happens."""
        sizes = {source.fn.arg_names[place]: value for (place,), value in source.constants.items()}
        found = {"kernel": metadata.name, "queries": sizes.get("QUERIES"), "warps": metadata.num_warps}
        self.compiled.append(found)
        return lambda *arguments: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The one that Triton asks for."""
        return {"max_shared_mem": SHARED[self.capability] * 1024}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers and spilled bytes of a thread, threads that a program may have."""
        used = _resources(cubin)
        self.compiled[-1] |= {"registers": used["REG"], "stack": used["STACK"], "shared": shared}
        return (self, self, used["REG"], used["STACK"], 65536 // used["REG"])


def _resources(cubin: bytes) -> dict[str, int]:
    """As NVIDIA's tool, which comes with Triton, names them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said)}


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdar-4b", choices=SHAPES)
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(SHARED), choices=SHARED)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args(argv)
    found = []
    for capability in arguments.capabilities:
        for dtype in (torch.bfloat16, torch.float32):
            driver = CompilingDriver(capability)
            triton.runtime.driver.set_active(driver)
            launch_all(SHAPES[arguments.model], dtype)
            found += [{"capability": capability, "dtype": str(dtype)[6:]} | taken for taken in driver.compiled]
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    text = json.dumps(
        {"benchmark": "compiled", "triton": triton.__version__, "settings": settings, "results": found}, indent=1
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def launch_all(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Passes of one layer in which a row has 4, 8 and 16 queries; its numbers are those of nothing."""
    hidden, _, *widths, _ = shape
    model = random_model((hidden, 1, *widths, 64), device=torch.device("cpu"), dtype=dtype, seed=0)
    cache, decoder = KVCache(model.hf.config, dtype=dtype, device=model.device), Decoder(model, fused=True)
    cache.resize(2, 16, kept=0)
    for queries in (4, 8, 16):
        tokens = torch.zeros(2 * queries, dtype=torch.long)
        at = FixedTensors(tokens, tokens, tokens, tokens.view(2, queries))
        decoder.hidden(tokens, tokens, FusedLayout(cache, at))


if __name__ == "__main__":
    main()
