"""Log-probs of single tokens under a vocabulary-sized softmax, without the logits of all positions at once.

    hidden [M, H] ──► a chunk of logits ──► log-softmax ──► log-prob of each target, entropy
                         ▲                                      │
    backward: the same chunk again ◄── softmax - target ◄───────┘ ──► one gradient of the weight, added to in place

Autograd alone would keep the logits of every chunk, and hold the gradient of the weight once for each chunk that is
being added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TargetHead(nn.Linear):
    """An LM head that can also score targets: one call whatever their number, since ZeRO-3 gathers a weight for calls
    of its module, and every rank must make the same ones."""

    @classmethod
    def of(cls, linear: nn.Linear) -> TargetHead:
        """The same head: it shares the weight."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(self, hidden: torch.Tensor, scored: tuple[Any, ...] | None = None) -> Any:
        """hidden [M, H] -> logits [M, V]; with what `TargetScores` takes after the weight, its result."""
        return super().forward(hidden) if scored is None else TargetScores.apply(hidden, self.weight, *scored)


def log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, suppressed: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[M, H] and [V, H] -> log-probs [M, V] in fp32 at least, ``suppressed`` ids at -inf."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill_(-1, suppressed, -torch.inf)
    return torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """[M, V] log-probs -> [M], in nats."""
    p = logprobs.exp()
    return torch.special.entr(p, out=p).sum(dim=-1)


class TargetScores(torch.autograd.Function):
    """(hidden [M, H], weight [V, H], targets [M], suppressed ids, temperature, chunk) -> log-probs, entropies [M].

    ``chunk`` targets at a time. Entropies carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        suppressed: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        chosen, entropies = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logprobs = log_softmax(h, weight, suppressed, temperature)
            chosen.append(logprobs.gather(-1, t[:, None]).squeeze(-1))
            entropies.append(entropy(logprobs))
        # What fits into one chunk is kept, and the backward pass computes nothing twice.
        kept = logprobs if len(chosen) == 1 else None
        ctx.save_for_backward(hidden, weight, targets, suppressed, kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        found = torch.cat(entropies)
        ctx.mark_non_differentiable(found)
        return torch.cat(chosen), found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p(t) / d logits = (one at t) - softmax."""
        hidden, weight, targets, suppressed, kept = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        # Many chunks added up in bf16 would lose what each of them brings.
        to_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logprobs = kept
            if kept is None:
                logprobs = log_softmax(hidden[part], weight, suppressed, ctx.temperature)
            scale = (gradients[0][part] / ctx.temperature)[:, None].to(logprobs.dtype)
            # Not in place where it was saved: a second backward pass must find it.
            d = (logprobs.exp() if kept is not None else logprobs.exp_()).mul_(-scale)
            d.scatter_add_(-1, targets[part, None], scale)
            d = d.to(weight.dtype)
            torch.matmul(d, weight, out=to_hidden[part])
            if to_weight.dtype == weight.dtype:
                to_weight.addmm_(d.T, hidden[part])
            else:
                to_weight.add_(d.T @ hidden[part])
        return to_hidden, to_weight.to(weight.dtype), None, None, None, None
