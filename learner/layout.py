"""How a micro-batch attends: split attention on CPU, block-sparse FlexAttention on CUDA.

All follow `tstar_ray.blocks.train_visibility`. With C clean tokens and n slices of B tokens, a row has N = C + nB
tokens, and dense attention costs N^2. But a slice sees only clean tokens and itself, so `SplitLayout` computes
about C^2 + nB C of them, for rows that hold one trajectory each. Rows that hold several fall back to one dense
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

GROUP_TOKENS = 64
"""Slice tokens that attend together on CPU: small groups waste less on each other, large ones copy less context."""
WIDTH_MULTIPLE = 512
"""Row widths on CUDA are multiples of this."""


def make_layout(batch: MicroBatch, dtype: torch.dtype) -> Layout:
    """The layout for the device the batch is on."""
    if batch.ids.device.type == "cuda":
        return FlexLayout(batch.document, batch.block, batch.slice_id, compiled=True)
    if int(batch.document.max()) == 0:
        return SplitLayout(batch.document, batch.block, batch.slice_id, dtype)
    return TrainLayout(train_visibility(batch.document, batch.block, batch.slice_id), dtype)


def forward_inputs(
    batch: MicroBatch | None, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Layout, torch.Tensor, torch.Tensor]:
    """Arguments of a forward pass for a batch on its device; without a batch one token, so that ZeRO's collectives
    run."""
    if batch is None:
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        layout = TrainLayout(torch.ones((1, 1, 1), dtype=torch.bool, device=device), dtype)
        return zero, zero, layout, zero[0], zero[0]
    return batch.ids, batch.positions, make_layout(batch, dtype), batch.index, batch.targets


class SplitLayout:
    """Rows of one trajectory each, [C clean tokens | slices of B tokens | padding].

    Slices are taken in groups of about `GROUP_TOKENS`; a group attends to [clean tokens | the group] in one
    batched SDPA call, whose kernel holds no scores.
    """

    def __init__(self, document: torch.Tensor, block: torch.Tensor, slice_id: torch.Tensor, dtype: torch.dtype) -> None:
        """Three [R, N] integer tensors as in `train_visibility`; ``document`` is 0, or -1 for padding."""
        rows, width = document.shape
        position = torch.arange(width, device=document.device)
        clean = (document == 0) & (slice_id < 0)
        noisy = slice_id >= 0
        count_R = clean.sum(1)
        block_size = int((slice_id[0] == 0).sum())
        group = max(1, GROUP_TOKENS // block_size) * block_size
        self._clean, self._groups = int(count_R.max()), -(-int(noisy.sum(1).max()) // group)
        slices = torch.arange(self._groups * group, device=document.device)
        # [R, M] where the slice tokens of a row stand; rows with fewer repeat their last token, unused.
        self._slices_RM = (count_R[:, None] + slices).clamp(max=width - 1)
        # [R, N] where each token's result is found in [clean results | slice results].
        after_clean = self._clean + (position - count_R[:, None])
        self._source_RN = torch.where(clean, position, torch.where(noisy, after_clean, 0))
        key_block = torch.where(clean, block, torch.iinfo(block.dtype).max)[:, None, : self._clean]
        sees_itself = torch.eye(self._clean, dtype=torch.bool, device=document.device)
        self._clean_bias = _bias((key_block <= block[:, : self._clean, None]) | sees_itself, dtype)
        context = (key_block < block.gather(1, self._slices_RM)[:, :, None]).unflatten(1, (self._groups, group))
        which = (slices // block_size).unflatten(0, (self._groups, group))
        own = (which[:, :, None] == which[:, None, :]).expand(rows, -1, -1, -1)
        self._slice_bias = _bias(torch.cat([context, own], dim=-1).flatten(0, 1), dtype)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`."""
        shared = query.shape[1] // key.shape[1]
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        rows, heads, _, size = query.shape
        clean_query, clean_key, clean_value = (x[:, :, : self._clean] for x in (query, key, value))
        clean = F.scaled_dot_product_attention(
            clean_query, clean_key, clean_value, attn_mask=self._clean_bias, scale=scale
        )
        where = self._slices_RM[:, None, :, None].expand(-1, heads, -1, size)

        def grouped(x: torch.Tensor) -> torch.Tensor:
            """[R, H, N, D] -> [R * groups, H, group, D]."""
            return x.gather(2, where).unflatten(2, (self._groups, -1)).transpose(1, 2).flatten(0, 1)

        def with_context(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return torch.cat([context[:, None].expand(-1, self._groups, -1, -1, -1).flatten(0, 1), grouped(x)], dim=2)

        noisy = F.scaled_dot_product_attention(
            grouped(query),
            with_context(key, clean_key),
            with_context(value, clean_value),
            attn_mask=self._slice_bias,
            scale=scale,
        )
        noisy = noisy.unflatten(0, (rows, self._groups)).transpose(1, 2).flatten(2, 3)
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
    # For all widths at once. Past its limit of variants PyTorch would go on unfused, with dense scores, unless it may
    # not leave the graph.
    return torch.compile(function, dynamic=True, fullgraph=True)
