"""What DeepSpeed trains: the policy, with a value head on it or a value model beside it.

    Policy       BlockDiffusionLM [+ head on the same hidden states]   -> log-probs, entropies, values
    ValueModel   a copy of its backbone + head                         -> values

Heads are one linear map without bias, zero at the start, so that the first advantages are the plain rewards
(algorithm reference 2.9). Values are read where targets are predicted: at masked positions of the slices.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from tstar_ray.model import BlockDiffusionLM, Layout, hidden_at


def _zero_head(model: BlockDiffusionLM) -> nn.Linear:
    head = nn.Linear(model.hf.config.hidden_size, 1, bias=False, device=model.device, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    return head


class Policy(nn.Module):
    """A block-diffusion model, optionally with a value head."""

    def __init__(self, lm: BlockDiffusionLM, *, value_head: bool) -> None:
        super().__init__()
        self.lm = lm
        self.head = _zero_head(lm) if value_head else None

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        layout: Layout,
        index: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of ``targets`` as `BlockDiffusionLM.forward`, and values; all [M]."""
        hidden = self.lm.hidden_at(ids, positions, layout, index)
        logprobs, entropies = self.lm.score(hidden, targets, temperature)
        values = torch.zeros_like(entropies) if self.head is None else self.head(hidden).squeeze(-1).float()
        return logprobs, entropies, values


class ValueModel(nn.Module):
    """A backbone of its own, started as a copy of the policy's, and a value head."""

    def __init__(self, lm: BlockDiffusionLM) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(lm.hf.model)
        self.head = _zero_head(lm)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, index: torch.Tensor) -> torch.Tensor:
        """Values [M] at flat indices ``index`` [M] into [R * N]."""
        return self.head(hidden_at(self.backbone, ids, positions, layout, index)).squeeze(-1).float()
