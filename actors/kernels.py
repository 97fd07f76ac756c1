"""Operations between a pass's matrix products, of one kernel each on CUDA.

They are PyTorch operations, ``torch.ops.tstar``, so that whoever watches operations sees them: CUDA graphs, the counts
of benchmarks/launches.py, the GPU that tests pretend. What they launch is in actors.triton_kernels, which is imported
when the first of them runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

_LIBRARY = torch.library.Library("tstar", "DEF")
_MODULE = "actors.triton_kernels"


def available() -> bool:
    """Whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


def _define(schema: str, shape: Any = None) -> Any:
    """An operation that the function of its name computes; ``shape`` gives that of its result."""
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(_MODULE), name)(*args)

    def on_meta(*args: Any) -> Any:
        return None if shape is None else args[0].new_empty(shape(*args))

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_meta, "Meta")
    return getattr(torch.ops.tstar, name)


norm_rotate_ = _define(
    "norm_rotate_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, int heads, int kv_heads,"
    " float eps) -> ()"
)
"""RMS norm over each head (without weights: none) and RoPE of the first ``heads`` + ``kv_heads`` heads of x
[N, *, D]; cos and sin are [N, D], whose halves are the same, and both weights [D]."""

store_ = _define(
    "store_(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slot, Tensor position) -> ()"
)
"""key and value [N, Hkv, D] to their slots and positions [N] in keys and values [S, Hkv, T, D]."""

attend = _define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor end, Tensor? token, float scale) -> Tensor",
    lambda query, keys, values, end, token, scale: (*end.shape, *query.shape[1:]),
)
"""query [N, H, D] of the tokens that ``token`` [R, Q] names, -1 where none is (None: all in order), over the positions
below ``end`` [R, Q] of the first R slots of keys and values [S, Hkv, T, D]: [R, Q, H, D]."""

silu_mul = _define("silu_mul(Tensor x) -> Tensor", lambda x: (len(x), x.shape[1] // 2))
"""x [N, 2F], gate and up: SiLU of the one, times the other, [N, F]."""
