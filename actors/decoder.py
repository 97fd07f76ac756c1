"""The engine's forward pass: the layers of a `BlockDiffusionLM` in far fewer operations than transformers' modules.

    tokens ──► [ norm ──► QKV ──► norm, rotate ──► Layout.attend ──► + ──► norm ──► gate, up ──► down ──► + ]* ──► norm

A pass of few tokens costs a GPU its launches more than its arithmetic, and so does one of a small model on CPU. What
stands side by side is therefore one product: query, key and value, gate and up, of which one alone would not fill a
GPU either. What is added to the hidden states is added by the product that computes it.

Parameters remain the model's: those of one product are made neighbours in one memory, of which each keeps its part, so
that weights copied into the model are here at once. The learner runs transformers' modules, whose results these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actors import kernels
from tstar_ray.model import BlockDiffusionLM, Layout


class Decoder:
    """Layers of Qwen3 and Llama for N tokens without a batch dimension; nothing is kept for a backward pass."""

    def __init__(self, model: BlockDiffusionLM, *, fused: bool = False) -> None:
        """``model`` is not moved to another device or dtype from here on. ``fused``: with actors.kernels."""
        config = model.hf.config
        self.fused = fused
        self.groups: int = config.num_attention_heads // config.num_key_value_heads
        """Query heads that share one key head."""
        self._backbone: Any = model.hf.model
        self._layers = [
            _Layer(layer, i, config.num_attention_heads, config.num_key_value_heads, fused=fused)
            for i, layer in enumerate(self._backbone.layers)
        ]

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids and positions [N] -> final hidden states [N, H], or with ``wanted`` [M] those of its tokens, [M, H]."""
        hidden = self._backbone.embed_tokens(ids)
        cos_1ND, sin_1ND = self._backbone.rotary_emb(hidden[None], positions[None])
        rotation = cos_1ND[0, :, None], sin_1ND[0, :, None]
        for layer in self._layers[:-1]:
            layer.attend(hidden, rotation, layout)
            layer.feed(hidden)
        last = self._layers[-1]
        last.attend(hidden, rotation, layout)
        if wanted is not None:
            hidden = hidden.index_select(0, wanted)  # the others have given their keys and values
        last.feed(hidden)
        return self._backbone.norm(hidden)


class _Layer:
    """One pre-norm decoder layer; both halves change hidden states [N, H] in place."""

    def __init__(self, layer: Any, index: int, heads: int, kv_heads: int, *, fused: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index, self._heads, self._kv_heads = index, heads, kv_heads
        self._dim, self._scale = attention.head_dim, attention.scaling
        self._attention_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _side_by_side(mlp.gate_proj, mlp.up_proj)
        self._out, self._down, self._activation = attention.o_proj, mlp.down_proj, mlp.act_fn
        self._silu = mlp.config.hidden_act == "silu"
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self._fused = fused

    def attend(self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: Layout) -> None:
        """``rotation``: cosines and sines [N, 1, D]."""
        tokens, q, k = len(hidden), self._heads, self._kv_heads
        qkv = F.linear(self._attention_norm(hidden), *self._qkv).view(tokens, q + 2 * k, self._dim)
        query, key = self._normed_and_rotated(qkv, rotation).split([q, k], dim=1)
        heads = [x.transpose(0, 1)[None] for x in (query, key, qkv[:, q + k :])]
        found = layout.attend(self._index, heads[0], heads[1], heads[2], self._scale)
        _add(hidden, found.reshape(tokens, -1), self._out)

    def _normed_and_rotated(self, qkv: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Query and key heads of [N, heads, D], which may change."""
        q, k = self._heads, self._kv_heads
        if not self._fused:
            return _rotate(self._normed(qkv)[:, : q + k], *rotation)
        cos, sin = rotation
        weights = [norm.weight for norm in self._head_norms] if self._head_norms else [None, None]
        eps = self._head_norms[0].eps if self._head_norms else 0.0
        kernels.norm_rotate_(qkv, cos[:, 0], sin[:, 0], *weights, q, k, eps)
        return qkv[:, : q + k]

    def _normed(self, qkv: torch.Tensor) -> torch.Tensor:
        """[N, heads, D]: with the norms of query and key heads, where there are any."""
        if self._head_norms is None:
            return qkv
        counts = (self._heads, self._kv_heads)
        weight = torch.cat([norm.weight.expand(count, -1) for norm, count in zip(self._head_norms, counts)])
        # Of the values too: a part of the heads would have to be copied first.
        return F.rms_norm(qkv, (self._dim,), eps=self._head_norms[0].eps)[:, : len(weight)] * weight

    def feed(self, hidden: torch.Tensor) -> None:
        """The MLP."""
        gate_up = F.linear(self._mlp_norm(hidden), *self._gate_up)
        if self._fused and self._silu:
            inner = kernels.silu_mul(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self._activation(gate).mul_(up)
        _add(hidden, inner, self._down)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [N, heads, D], whose halves x1 and x2 become x1 cos - x2 sin and x2 cos + x1 sin."""
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


def _add(hidden: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> None:
    """Add the linear map of ``x``."""
    hidden.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        hidden += linear.bias


def _side_by_side(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of linear maps of one input as those of a single one."""
    weight = _neighbours([linear.weight for linear in linears])
    return weight, None if linears[0].bias is None else _neighbours([linear.bias for linear in linears])


@torch.no_grad()
def _neighbours(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rows in one tensor, of which the parameters become parts; where they are that already, nothing moves."""
    first, sizes = parameters[0], [len(p) for p in parameters]
    places = [(p.untyped_storage().data_ptr(), p.storage_offset()) for p in parameters]
    following = [(storage, offset + p.numel()) for (storage, offset), p in zip(places, parameters)]
    if places[1:] == following[:-1]:
        return first.detach().as_strided((sum(sizes), *first.shape[1:]), first.stride())
    with torch.inference_mode(first.is_inference()):  # only a tensor of its own kind takes a parameter's place
        joined = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, joined.split(sizes)):
            parameter.data = part
    return joined
