"""Weights in a vLLM worker: a flat buffer in, and the checksum of what is served out.

    flat buffer (order of the checkpoint) ──► the model's own loader ──► fused, sharded parameters
    fused, sharded parameters ──► one checkpoint parameter at a time ──► checksum of all of them

vLLM fuses q, k, v and gate, up, pads the vocabulary, and gives every rank a part. The checksum undoes all that, so that
it equals that of the learner's flat buffer (tstar_ray.weights), read from what is served and not from what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather

from tstar_ray.weights import checksum_parts

Layout = list[tuple[str, tuple[int, ...]]]
"""Names and shapes of a checkpoint's parameters, in the order of the flat buffer."""


class WorkerExtension:
    """Methods that vLLM mixes into its worker; called through ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def tstar_load(self, flat: torch.Tensor | str, dtype: str, layout: Layout) -> None:
        """Copy a flat buffer into the model; ``flat`` may be the name of a file that holds it."""
        kind = getattr(torch, dtype)
        if isinstance(flat, str):
            total = sum(_size(shape) for _, shape in layout)
            flat = torch.from_file(flat, shared=True, size=total, dtype=kind)
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(self._named(flat, layout))
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the buffer is the caller's again

    def _named(self, flat: torch.Tensor, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        offset = 0
        for name, shape in layout:
            yield name, flat[offset : offset + _size(shape)].view(shape).to(self.device)
            offset += _size(shape)

    def tstar_serve(self, version: int) -> None:
        """Blocks begun from here on are of this weight version."""
        self.model_runner.model_state.canvases.version = version

    @torch.no_grad()
    def tstar_checksum(self, layout: Layout) -> str:
        """`tstar_ray.weights.checksum_parts` of what a flat buffer of the served weights would hold."""
        parameters = dict(self.model_runner.get_model().named_parameters())
        return checksum_parts(_whole(parameters, name, shape) for name, shape in layout)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def _whole(parameters: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One parameter of the checkpoint, gathered from all ranks."""
    module = name.split(".")[-2]
    if module in _FUSED:
        fused, part = _FUSED[module]
        local = parameters[name.replace(module, fused)]
        if fused == "qkv_proj":
            # Queries are cut by rank; keys and values too, or repeated where there are fewer heads than ranks.
            query = parameters[name.replace(f"{module}.weight", "o_proj.weight")].shape[1]
            sizes = [query, (len(local) - query) // 2, (len(local) - query) // 2]
        else:
            sizes = [len(local) // 2] * 2
        local, axis = local.split(sizes)[part], 0
    else:
        local = parameters[name]
        axis = 1 if module in ("o_proj", "down_proj") else 0
        if module not in ("o_proj", "down_proj", "embed_tokens", "lm_head"):
            return local  # norms are the same everywhere
    gathered = tensor_model_parallel_all_gather(local.contiguous(), dim=axis)
    if gathered.shape[axis] > shape[axis] and module in ("k_proj", "v_proj"):
        copies = gathered.shape[axis] // shape[axis]
        return gathered.unflatten(0, (-1, copies, len(local)))[:, 0].flatten(0, 1)
    return gathered.narrow(axis, 0, shape[axis])  # the vocabulary is padded
