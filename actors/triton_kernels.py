"""Four Triton kernels for what stands between the matrix products of a pass: most of its launches on a GPU.

Each rounds where the learner's modules round, so that in bf16 too an engine differs from the learner by its products
and its attention alone. A program is a few heads of one token, or in attention some queries of one row and key head.

Launched by the operations in actors.kernels; this module is imported where Triton is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 8
"""Heads of a token that one program takes."""
_COLUMNS = 1024
"""Of the MLP."""
_TILE = 64
"""Queries of a program, each of one head, and keys that they look at together, at most."""
_TILE_BYTES = 2**14
"""Of these keys. Larger tiles do not fit into registers (benchmarks/compiled.py): 64 keys of 128 columns in bf16."""
_LEAST = 16
"""Queries, keys and columns: what a tensor core takes."""


@triton.jit
def normed_rotated(
    x,  # [N, *, D], contiguous; its first q + k heads change
    cos,  # [N, D]
    sin,  # [N, D]
    q_weight,  # [D]
    k_weight,  # [D]
    stride,  # of x from token to token
    q: tl.constexpr,
    k: tl.constexpr,
    eps,
    D: tl.constexpr,
    NORMS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2 and what fills it up to a power of two
):
    """Norm over each head, then RoPE."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    there = column < D // 2
    at = x + token * stride + head[:, None] * D + column[None]
    mask = (head < q + k)[:, None] & there[None]
    low = tl.load(at, mask=mask, other=0)
    high = tl.load(at + D // 2, mask=mask, other=0)
    kind = low.dtype
    if NORMS:
        a, b = low.to(tl.float32), high.to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        query = (head < q)[:, None]
        low_q, low_k = tl.load(q_weight + column, mask=there), tl.load(k_weight + column, mask=there)
        high_q = tl.load(q_weight + D // 2 + column, mask=there)
        high_k = tl.load(k_weight + D // 2 + column, mask=there)
        low = (a * scale * tl.where(query, low_q[None], low_k[None]).to(tl.float32)).to(kind)
        high = (b * scale * tl.where(query, high_q[None], high_k[None]).to(tl.float32)).to(kind)
    c = tl.load(cos + token * D + column, mask=there).to(tl.float32)[None]
    s = tl.load(sin + token * D + column, mask=there).to(tl.float32)[None]
    a, b = low.to(tl.float32), high.to(tl.float32)
    # Products round before they are added.
    first = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
    second = (b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)
    tl.store(at, first.to(kind), mask=mask)
    tl.store(at + D // 2, second.to(kind), mask=mask)


@triton.jit
def stored(
    keys,  # [S, Hkv, T, D], contiguous
    values,  # as keys
    key,  # [N, Hkv, D], heads contiguous
    value,  # as key
    slot,  # [N]
    position,  # [N]
    stride,  # of key and value from token to token
    T,
    K: tl.constexpr,  # Hkv
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # D and what fills it up to a power of two
):
    """Keys and values to their places in the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    mask = (head < K)[:, None] & (column < D)[None]
    source = token * stride + head[:, None] * D + column[None]
    row = (tl.load(slot + token) * K + head) * T + tl.load(position + token)
    target = row[:, None] * D + column[None]
    tl.store(keys + target, tl.load(key + source, mask=mask), mask=mask)
    tl.store(values + target, tl.load(value + source, mask=mask), mask=mask)


@triton.jit
def attended(
    query,  # [N, H, D], heads contiguous
    keys,  # [S, Hkv, T, D], contiguous
    values,  # as keys
    end,  # [R, Q] one past the last position that each query sees, 1 at least
    token,  # [R, Q] which token each query is, -1 where none is; without PLACED they are all tokens
    out,  # [R, Q, H, D]
    stride,  # of query from token to token
    T,
    scale,
    Q,
    K: tl.constexpr,  # Hkv
    G: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    PLACED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,  # D and what fills it up to a power of two
):
    """Softmax over the positions that each query sees, a piece of them at a time (FlashAttention, arXiv 2307.08691).

    Query heads that share a key head are more queries. A row's pieces end where its own queries see no more, and none
    depends on other rows.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    place, group = row * Q + index // G, index % G
    there = index // G < Q
    stop = tl.load(end + place, mask=there, other=1)
    if PLACED:
        source = tl.load(token + place, mask=there, other=-1)
    else:
        source = tl.where(there, place, -1)
    column = tl.arange(0, WIDTH)
    wide = (column < D)[None]
    offset = (head * G + group)[:, None] * D + column[None]
    x = tl.load(query + source[:, None] * stride + offset, mask=(source >= 0)[:, None] & wide, other=0)
    cache = (row * K + head) * T * D
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    farthest = tl.max(stop, 0).to(tl.int32)
    for first in range(0, farthest, KEYS):
        at = first + tl.arange(0, KEYS)
        address = cache + at[:, None] * D + column[None]
        mask = (at < farthest)[:, None] & wide
        piece = tl.load(keys + address, mask=mask, other=0)
        scores = tl.dot(x, tl.trans(piece), input_precision="ieee") * scale
        scores = tl.where(at[None] < stop[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))  # finite: every query sees position 0
        shrink, weight = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        piece = tl.load(values + address, mask=mask, other=0)
        result = result * shrink[:, None] + tl.dot(weight.to(piece.dtype), piece, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        top = higher
    result /= total[:, None]
    target = out + place[:, None] * (K * G * D) + offset
    tl.store(target, result.to(x.dtype), mask=there[:, None] & wide)


@triton.jit
def gated(
    x,  # [N, 2F] gate and up, contiguous
    out,  # [N, F]
    F,
    COLUMNS: tl.constexpr,
):
    """SiLU of the gate, times up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < F
    gate = tl.load(x + token * 2 * F + column, mask=there)
    up = tl.load(x + token * 2 * F + F + column, mask=there)
    wide = gate.to(tl.float32)
    active = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + token * F + column, active * up, mask=there)


def norm_rotate_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> None:
    """See actors.kernels, as for the others."""
    tokens, _, dim = x.shape
    norms = q_weight is not None
    normed_rotated[tokens, triton.cdiv(heads + kv_heads, _HEADS)](
        x,
        cos,
        sin,
        q_weight if norms else x,
        k_weight if norms else x,
        x.stride(0),
        heads,
        kv_heads,
        eps,
        D=dim,
        NORMS=norms,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(dim // 2),
    )


def store_(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """See actors.kernels."""
    tokens, kv_heads, dim = key.shape
    stored[tokens, triton.cdiv(kv_heads, _HEADS)](
        keys,
        values,
        key,
        value,
        slot,
        position,
        key.stride(0),
        keys.shape[2],
        K=kv_heads,
        D=dim,
        HEADS=_HEADS,
        WIDTH=triton.next_power_of_2(dim),
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    end: torch.Tensor,
    token: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See actors.kernels."""
    (rows, queries), (_, heads, dim), kv_heads = end.shape, query.shape, keys.shape[1]
    groups, width = heads // kv_heads, max(_LEAST, triton.next_power_of_2(dim))
    out = query.new_empty(rows, queries, heads, dim)
    most = min(_TILE, _TILE_BYTES // (width * keys.itemsize))
    at_once = min(max(_LEAST, triton.next_power_of_2(queries * groups)), most)
    attended[rows, kv_heads, triton.cdiv(queries * groups, at_once)](
        query,
        keys,
        values,
        end,
        end if token is None else token,
        out,
        query.stride(0),
        keys.shape[2],
        scale,
        queries,
        K=kv_heads,
        G=groups,
        D=dim,
        PLACED=token is not None,
        QUERIES=at_once,
        KEYS=most,
        WIDTH=width,
        num_stages=2,
        num_warps=8 if at_once == most else 4,
    )
    return out


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """See actors.kernels."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(tokens, width)
    gated[tokens, triton.cdiv(width, _COLUMNS)](x, out, width, COLUMNS=_COLUMNS)
    return out
