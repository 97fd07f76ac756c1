"""The last decoder layer, computed in full only where its result is used.

Of the N tokens of training rows, M are predicted: the targets. The others matter to the last layer by their keys and
values alone; their results would be thrown away, and with them the MLP, most of what a layer costs. All layers before
it need every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class LastLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer (Qwen3, Llama) made of another one's modules: parameters keep their names and order."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    @classmethod
    def of(cls, layer: nn.Module) -> LastLayer:
        """The same layer: it shares the modules."""
        last = cls()
        for name, module in layer.named_children():
            setattr(last, name, module)
        return last.train(layer.training)

    def forward(self, hidden: torch.Tensor, *, wanted: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        """hidden [R, N, H] -> the same shape; with ``wanted`` [M], flat indices into [R * N], [1, M, H]."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **more)
        hidden = hidden + attended
        if wanted is not None:
            hidden = hidden.flatten(0, 1).index_select(0, wanted)[None]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
