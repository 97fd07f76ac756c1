"""Sampling and unmasking, vectorised over sequences and shared by the engines.

For every masked position of a block the engine draws a candidate token and its confidence; the strategy then
says which candidates are revealed. Pure functions of tensors: no model, no loop over sequences.

Random numbers are counters, not state: the uniform for one position at one step is a hash of (sample seed,
position, step), so a sample is the same whatever batch it is decoded in (trap 26), and one number a position
suffices because tokens are drawn by inverting the cumulative distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tstar_ray.decoding import Decoding

_MASK_63 = (1 << 63) - 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (wrapping) arithmetic; the shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & (_MASK_63 >> 29))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (_MASK_63 >> 26))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (_MASK_63 >> 30))


def uniforms(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), one for every element of three int64 tensors of one shape; float32."""
    golden = -0x61C8864680B583EB
    bits = _mix(_mix(_mix(seed + golden) + position * golden) + step)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True, slots=True)
class Candidates:
    """One drawn token for each of M masked positions."""

    token: torch.Tensor
    """[M] int64."""
    logprob: torch.Tensor
    """[M] log-prob under the untruncated softmax at the sampling temperature (at 1 when greedy)."""
    confidence: torch.Tensor
    """[M] probability that ranks the positions (`Decoding.confidence`)."""
    entropy: torch.Tensor
    """[M] entropy in nats of the plain softmax; zeros unless the strategy needs it."""


def draw(logits: torch.Tensor, uniform: torch.Tensor, decoding: Decoding) -> Candidates:
    """Draw a token at each of M positions from logits [M, V] (suppressed ids at -inf) and uniforms [M]."""
    raw = torch.log_softmax(logits.float(), dim=-1)
    temperature = decoding.temperature
    sampled = raw
    if temperature == 0:
        token = raw.argmax(dim=-1)
        density = raw
    else:
        density = raw if temperature == 1 else torch.log_softmax(raw / temperature, dim=-1)
        sampled = truncate(density, top_k=decoding.top_k, top_p=decoding.top_p)
        cumulative = sampled.exp().cumsum(dim=-1)
        aim = uniform[:, None] * cumulative[:, -1:]
        # The first entry whose cumulative mass exceeds the aim has positive probability by construction.
        token = torch.searchsorted(cumulative, aim, right=True).squeeze(-1).clamp_(max=raw.shape[-1] - 1)
    picked = token[:, None]
    ranking = sampled if decoding.confidence == "sampled" else raw
    if decoding.strategy == "entropy":
        entropy = torch.special.entr(raw.exp()).sum(dim=-1)
    else:
        entropy = torch.zeros_like(uniform)
    return Candidates(
        token=token,
        logprob=density.gather(-1, picked).squeeze(-1),
        confidence=ranking.gather(-1, picked).squeeze(-1).exp(),
        entropy=entropy,
    )


def truncate(log_density: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the ``top_k`` likeliest of [M, V], then the smallest set that holds ``top_p``; renormalised log-probs."""
    if top_k == 0 and top_p >= 1:
        return log_density
    ordered, index = log_density.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if 0 < top_k < ordered.shape[-1]:
        keep[..., top_k:] = False
    if top_p < 1:
        probabilities = torch.softmax(ordered.masked_fill(~keep, -torch.inf), dim=-1)
        keep &= probabilities.cumsum(dim=-1) - probabilities < top_p
    kept = torch.zeros_like(keep).scatter(-1, index, keep)
    return torch.log_softmax(log_density.masked_fill(~kept, -torch.inf), dim=-1)


def choose(
    masked: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    quota: torch.Tensor,
    decoding: Decoding,
) -> torch.Tensor:
    """Which positions this step reveals.

    ``masked`` bool, ``confidence`` and ``entropy`` [S, B] (anything where not masked), ``quota`` [S] tokens
    due at least; returns bool [S, B], a subset of ``masked``, never empty in a row that has a mask. Ties go
    to the lowest position. ``quota`` never reaches past the masked positions (trap 16).
    """
    if decoding.strategy == "sequential":
        return masked & (masked.cumsum(dim=-1) <= quota[:, None])
    if decoding.strategy == "entropy":
        values, index = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
        within = values.cumsum(dim=-1) < decoding.entropy_bound
        within[:, 0] = True
        return torch.zeros_like(masked).scatter(-1, index, within) & masked
    score = confidence.masked_fill(~masked, -1.0)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    reveal = rank < quota[:, None]
    if decoding.strategy == "dynamic":
        reveal |= score > decoding.threshold
    return reveal & masked
