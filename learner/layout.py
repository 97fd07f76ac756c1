"""How a micro-batch attends: a dense bias under SDPA on CPU, block-sparse FlexAttention on CUDA.

Both follow `tstar_ray.blocks.train_visibility`. The dense bias holds N^2 values a row, built once for all layers.
FlexAttention (torch.nn.attention.flex_attention) evaluates the rule inside its kernel and skips tiles of 128 x
128 that see nothing, which are most of them: slices of different blocks never see each other. It is compiled
once per shape, and `WIDTH_MULTIPLE` keeps shapes few.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from learner.packing import MicroBatch
from tstar_ray.blocks import train_visibility
from tstar_ray.model import Layout, TrainLayout

WIDTH_MULTIPLE = 512
"""Row widths on CUDA are multiples of this."""


def make_layout(batch: MicroBatch, dtype: torch.dtype) -> Layout:
    """The layout for the device the batch is on."""
    if batch.ids.device.type == "cuda":
        return FlexLayout(batch.document, batch.block, batch.slice_id, compiled=True)
    return TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), dtype)


class FlexLayout:
    """Packed rows under FlexAttention; three [R, N] integer tensors as in `train_visibility`."""

    def __init__(self, document: torch.Tensor, block: torch.Tensor, slice_id: torch.Tensor, *, compiled: bool) -> None:
        """``compiled``: fused kernels; otherwise PyTorch's plain, dense evaluation of the same rule."""

        def visible(r: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            earlier = (block[r, k] < block[r, q]) | ((slice_id[r, q] < 0) & (block[r, k] == block[r, q]))
            own_slice = (slice_id[r, q] >= 0) & (slice_id[r, q] == slice_id[r, k])
            return (document[r, q] == document[r, k]) & (((slice_id[r, k] < 0) & earlier) | own_slice)

        rows, width = document.shape
        make_mask = _compiled(create_block_mask) if compiled else create_block_mask
        self.mask = make_mask(visible, rows, None, width, width, device=str(document.device))
        self._attention = _compiled(flex_attention) if compiled else flex_attention

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`."""
        grouped = query.shape[1] != key.shape[1]
        out = self._attention(query, key, value, block_mask=self.mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
