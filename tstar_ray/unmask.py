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
_LOTTERY_STEP = -1
"""Step that no decoding has: its uniforms are the lottery of a random reveal order."""
_PIECE = 128
"""Vocabulary entries summed together when a token is looked up."""
_WIDE_PIECE = 2**14
"""Vocabulary entries of all rows turned to fp32 together."""
_ENTRIES = 2**22
"""Entries of whole rows turned to fp32 together."""


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


def lottery(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One number a position that stays the same in all steps, independent of what is drawn there; see `choose`."""
    return uniforms(seed, position, torch.full_like(position, _LOTTERY_STEP))


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
    """Draw a token at each of M positions from logits [M, V] (suppressed ids at -inf) and uniforms [M].

    ``logits`` are overwritten, so that one vocabulary-sized tensor serves the whole draw where nothing is truncated.
    """
    temperature = decoding.temperature
    entropy = torch.zeros_like(uniform)
    if decoding.strategy == "entropy":
        entropy = _entropy(logits)
    if temperature == 0:
        token = logits.argmax(dim=-1)
        logprob = _pick(logits, token).float() - _logsumexp(logits)
        return Candidates(token=token, logprob=logprob, confidence=logprob.exp(), entropy=entropy)
    if decoding.top_k or decoding.top_p < 1:
        raw = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        density = raw if temperature == 1 else torch.log_softmax(raw / temperature, dim=-1)
        sampled = truncate(density, top_k=decoding.top_k, top_p=decoding.top_p)
        token, _ = invert(sampled.exp(), uniform)
        ranking = sampled if decoding.confidence == "sampled" else raw
        return Candidates(
            token=token, logprob=_pick(density, token), confidence=_pick(ranking, token).exp(), entropy=entropy
        )
    if temperature == 1:
        own = logits if logits.dtype == torch.float32 else None
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32, out=own)
        token, total = invert(weights, uniform)
        logprob = confidence = (_pick(weights, token) / total).log()
    else:
        logits = logits.float()
        top = logits.amax(dim=-1)
        norm = logits.logsumexp(dim=-1) if decoding.confidence == "raw" else None
        weights = logits.sub_(top[:, None]).div_(temperature).exp_()
        token, total = invert(weights, uniform)
        chosen = _pick(weights, token).log()  # a weight that can be drawn is far from underflow
        logprob = chosen - total.log()
        confidence = logprob if norm is None else chosen * temperature + top - norm
    return Candidates(token=token, logprob=logprob, confidence=confidence.exp(), entropy=entropy)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """[M, V] -> fp32 [M], a few rows at a time."""
    parts = logits.split(max(1, _ENTRIES // logits.shape[-1]))
    return torch.cat([torch.special.entr(torch.softmax(part.float(), dim=-1)).sum(dim=-1) for part in parts])


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """[M, V] -> fp32 [M]; of a smaller dtype a piece of the vocabulary at a time, never all of it in fp32."""
    if logits.dtype == torch.float32:
        return logits.logsumexp(dim=-1)
    parts = [part.float().logsumexp(dim=-1) for part in logits.split(_WIDE_PIECE, dim=-1)]
    return torch.stack(parts).logsumexp(dim=0)


def _pick(values: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, token[:, None]).squeeze(-1)


def _cumulative(values: torch.Tensor) -> torch.Tensor:
    """Along the last dimension of [M, N]. A single row PyTorch sums up on a GPU in an order that differs from call to
    call, so that ranks would disagree, and sums may fall."""
    return values.expand(2, -1).cumsum(dim=-1)[:1] if len(values) == 1 else values.cumsum(dim=-1)


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution of weights [M, V] >= 0 at uniforms [M] in [0, 1).

    Returns the first index whose cumulative weight exceeds ``uniform`` of the total, and the total; both [M]. The
    weight at the index is positive. Sums over pieces of the vocabulary find the piece, so that only that one is
    accumulated term by term.
    """
    size = weights.shape[-1]
    width = min(size, _PIECE)
    whole = size // width * width
    sums = weights[:, :whole].unflatten(-1, (-1, width)).sum(dim=-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    cumulative = _cumulative(sums)
    total = cumulative[:, -1]
    aim = uniform * total
    piece = torch.searchsorted(cumulative, aim[:, None], right=True).clamp_(max=sums.shape[-1] - 1)
    rest = aim - (cumulative - sums).gather(-1, piece).squeeze(-1)
    at = piece * width + torch.arange(width, device=weights.device)
    inside = _cumulative(weights.gather(-1, at.clamp(max=size - 1)).masked_fill_(at >= size, 0))
    # Rounding may carry the rest past the piece's own sum.
    below = torch.nextafter(inside[:, -1], torch.zeros_like(total))
    index = torch.searchsorted(inside, torch.minimum(rest, below).clamp_(min=0)[:, None], right=True)
    # Weights that are not numbers lead nowhere; an id of the vocabulary is due all the same.
    return (piece * width + index).squeeze(-1).clamp_(max=size - 1), total


def truncate(log_density: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the ``top_k`` likeliest of [M, V], then the smallest set that holds ``top_p``; renormalised log-probs."""
    if top_k == 0 and top_p >= 1:
        return log_density
    if 0 < top_k < log_density.shape[-1]:
        least = log_density.topk(top_k, dim=-1).values[..., -1:]
        above, tied = log_density > least, log_density == least
        # Ties to the lower id.
        kept = above | (tied & (tied.cumsum(dim=-1) <= top_k - above.sum(dim=-1, keepdim=True)))
        log_density = log_density.masked_fill(~kept, -torch.inf)
    if top_p < 1:
        ordered, index = log_density.sort(dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=-1)
        kept = _cumulative(probabilities) - probabilities < top_p
        log_density = log_density.masked_fill(~torch.zeros_like(kept).scatter(-1, index, kept), -torch.inf)
    return torch.log_softmax(log_density, dim=-1)


def choose(
    masked: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    quota: torch.Tensor,
    decoding: Decoding,
    lottery: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which positions this step reveals.

    ``masked`` bool, ``confidence`` and ``entropy`` [S, B] (anything where not masked), ``quota`` [S] tokens
    due at least; returns bool [S, B], a subset of ``masked``, never empty in a row that has a mask. Ties go
    to the lowest position. ``quota`` never reaches past the masked positions (trap 16).

    Under a forced order (`Decoding.order`) the strategy still says how many; ``lottery`` [S, B] ranks the positions of
    a random one, highest first.
    """
    if decoding.order == "sub_blocks":
        part = torch.arange(masked.shape[-1], device=masked.device) // decoding.sub_block
        first = part.expand_as(masked).masked_fill(~masked, masked.shape[-1]).amin(dim=-1, keepdim=True)
        masked = masked & (part == first)
    reveal = _by_strategy(masked, confidence, entropy, quota, decoding)
    if decoding.order not in ("left_to_right", "random"):
        return reveal
    if decoding.order == "random":
        assert lottery is not None, "a random order needs its lottery"
        rank = _rank(lottery.masked_fill(~masked, -1.0))
    else:
        rank = masked.cumsum(dim=-1) - 1
    return masked & (rank < reveal.sum(dim=-1, keepdim=True))


def _by_strategy(
    masked: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    quota: torch.Tensor,
    decoding: Decoding,
) -> torch.Tensor:
    if decoding.strategy == "sequential":
        return masked & (masked.cumsum(dim=-1) <= quota[:, None])
    if decoding.strategy == "entropy":
        values, index = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)
        within = values.cumsum(dim=-1) < decoding.entropy_bound
        within[:, 0] = True
        return torch.zeros_like(masked).scatter(-1, index, within) & masked
    score = confidence.masked_fill(~masked, -1.0)
    reveal = _rank(score) < quota[:, None]
    if decoding.strategy == "dynamic":
        reveal |= score > decoding.threshold
    return reveal & masked


def _rank(score: torch.Tensor) -> torch.Tensor:
    """Rank of each entry in its row, highest first, ties to the lowest index."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
