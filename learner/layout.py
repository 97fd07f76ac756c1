"""How a micro-batch attends: split attention on CPU, block-sparse FlexAttention on CUDA.

All follow `tstar_ray.blocks.train_visibility`. With C clean tokens and n slices of B tokens, a row has N = C + nB
tokens, and dense attention costs N^2. But a slice sees only clean tokens and itself, so `SplitLayout` computes
C^2 + nB (C + B) of them, for rows that hold one trajectory each. Rows that hold several fall back to one dense
bias (`TrainLayout`). FlexAttention (torch.nn.attention.flex_attention) evaluates the rule inside its kernel and
skips tiles of 128 x 128 that see nothing, which are most of them: slices of different blocks never see each
other. It is compiled once per shape, and `WIDTH_MULTIPLE` keeps shapes few.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
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
    if int(batch.document.max()) == 0:
        return SplitLayout(batch.document, batch.block, batch.slice_id, dtype)
    return TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), dtype)


class SplitLayout:
    """Rows of one trajectory each, [C clean tokens | slices of B tokens | padding]; plain matrix products."""

    def __init__(self, document: torch.Tensor, block: torch.Tensor, slice_id: torch.Tensor, dtype: torch.dtype) -> None:
        """Three [R, N] integer tensors as in `train_visibility`; ``document`` is 0, or -1 for padding."""
        width = document.shape[1]
        position = torch.arange(width, device=document.device)
        clean = (document == 0) & (slice_id < 0)
        noisy = slice_id >= 0
        count_R = clean.sum(1)
        self._clean = int(count_R.max())
        self._block_size = int((slice_id[0] == 0).sum())
        longest = int(noisy.sum(1).max())
        # [R, M] where the slice tokens of a row stand; rows with fewer repeat their last token, unused.
        self._slices_RM = (count_R[:, None] + position[:longest]).clamp(max=width - 1)
        # [R, N] where each token's result is found in [clean results | slice results].
        after_clean = self._clean + (position - count_R[:, None])
        self._source_RN = torch.where(clean, position, torch.where(noisy, after_clean, 0))
        key_block = torch.where(clean, block, torch.iinfo(block.dtype).max)[:, None, : self._clean]
        query_block = block[:, : self._clean, None]
        sees_itself = torch.eye(self._clean, dtype=torch.bool, device=document.device)
        self._clean_bias = _bias((key_block <= query_block) | sees_itself, dtype)
        self._slice_bias = _bias(key_block < block.gather(1, self._slices_RM)[:, :, None], dtype)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        (_, heads, _, size), c, b = query.shape, self._clean, self._block_size
        clean_key, clean_value = key[:, :, :c], value[:, :, :c]
        clean = F.scaled_dot_product_attention(
            query[:, :, :c], clean_key, clean_value, attn_mask=self._clean_bias, scale=scale
        )
        where = self._slices_RM[:, None, :, None].expand(-1, heads, -1, size)
        q = query.gather(2, where) * scale
        own_key, own_value = (x.gather(2, where).unflatten(2, (-1, b)) for x in (key, value))
        context = q @ clean_key.transpose(2, 3) + self._slice_bias
        own = (q.unflatten(2, (-1, b)) @ own_key.transpose(3, 4)).flatten(2, 3)
        seen, itself = torch.cat([context, own], dim=-1).softmax(dim=-1).split([c, b], dim=-1)
        noisy = seen @ clean_value + (itself.unflatten(2, (-1, b)) @ own_value).flatten(2, 3)
        source = self._source_RN[:, None, :, None].expand(-1, heads, -1, size)
        return torch.cat([clean, noisy], dim=2).gather(2, source).transpose(1, 2)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool [R, Q, K] -> additive [R, 1, Q, K]."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]


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
