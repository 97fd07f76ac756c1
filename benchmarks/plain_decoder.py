"""Block-diffusion decoding as the published generate scripts do it: what rollouts are compared with.

One sequence at a time with a KV cache; a denoising pass over the current block does not touch the cache; a finished
block is committed by a pass of its own; logits are computed at every position of every pass (SDAR's
``block_diffusion_generate``; algorithm reference 2.3). Sampling and unmasking are those of the engine.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tstar_ray.blocks import decode_limit
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM
from tstar_ray.trajectory import Request
from tstar_ray.unmask import choose, draw, uniforms


class _Past:
    """Keys and values of the committed prefix; the queries see it and each other, in prefill as ``bias`` says."""

    def __init__(self, layers: int) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self.store = False
        self.bias: torch.Tensor | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `tstar_ray.model.Layout.attend`; R is 1."""
        past = self.layers[layer]
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        if self.store:
            self.layers[layer] = (key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


@torch.inference_mode()
def decode(model: BlockDiffusionLM, request: Request, decoding: Decoding) -> tuple[list[int], list[int], int, int]:
    """Returns (ids up to the end of the terminal block, step map, completion length, forward passes)."""
    b, prompt = decoding.block_size, len(request.prompt_ids)
    limit = decode_limit(prompt, request.max_new_tokens or decoding.max_new_tokens, b)
    past = _Past(model.hf.config.num_hidden_layers)
    ids = torch.full((limit,), model.mask_id, device=model.device)
    ids[:prompt] = torch.tensor(request.prompt_ids, device=model.device)
    steps = torch.zeros(limit, dtype=torch.int32, device=model.device)
    position = torch.arange(limit, device=model.device)
    stop_ids = torch.tensor(decoding.stop_ids, device=model.device)
    start = prompt // b * b
    forwards = step = 0

    def run(begin: int, end: int, *, store: bool) -> torch.Tensor:
        past.store = store
        hidden = model.hidden(ids[None, begin:end], position[None, begin:end], past)[0]
        return model.logits(hidden)

    if start:
        block = position[:start] // b
        past.bias = torch.zeros(start, start, dtype=model.dtype, device=model.device)
        past.bias.masked_fill_(block[None, :] > block[:, None], -torch.inf)
        run(0, start, store=True)
        past.bias = None
        forwards += 1
    while True:
        end, block_step = start + b, 0
        while (masked := ids[start:end] == model.mask_id).any():
            logits = run(start, end, store=False)
            forwards, step = forwards + 1, step + 1
            seed = torch.full((b,), request.seed, device=model.device)
            found = draw(logits, uniforms(seed, position[start:end], torch.full_like(seed, step)), decoding)
            quota = torch.tensor([decoding.quota(min(block_step, decoding.steps - 1))], device=model.device)
            reveal = choose(masked[None], found.confidence[None], found.entropy[None], quota, decoding)[0]
            ids[start:end] = torch.where(reveal, found.token, ids[start:end])
            steps[start:end] = torch.where(reveal, step, steps[start:end])
            block_step += 1
        stops = torch.isin(ids[start:end], stop_ids) & (position[start:end] >= prompt)
        if stops.any() or end >= limit:
            length = int(start + stops.int().argmax()) + 1 - prompt if stops.any() else end - prompt
            return ids[:end].tolist(), steps[prompt:end].tolist(), length, forwards
        run(start, end, store=True)
        forwards += 1
        start = end
