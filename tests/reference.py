"""The decoding algorithm written down plainly (algorithm reference 2.3): no cache, no fusion, one sequence.

Every step is one forward of an unmodified transformers model over the whole sequence so far under an explicit
staircase mask; sampling, confidence and unmasking are loops over Python numbers. Only the uniform numbers are
shared with the engine, so that the same tokens can be drawn.
"""

import copy
import math

import numpy as np
import torch
import transformers

from tstar_ray.unmask import uniforms


def plain_twin(model):
    """An unmodified transformers model with the weights of a `BlockDiffusionLM`, on SDPA with boolean masks."""
    config = copy.deepcopy(model.hf.config)
    config._attn_implementation = "sdpa"
    twin = type(model.hf)(config).eval()
    twin.load_state_dict(model.hf.state_dict())
    return twin


@torch.no_grad()
def staircase_logits(twin, ids, block_size):
    """[T, V] logits of a whole sequence under the block-causal mask on the absolute grid."""
    block = torch.arange(len(ids)) // block_size
    visible = (block[None, :] <= block[:, None])[None, None]
    return twin(torch.tensor([ids]), attention_mask=visible).logits[0].double()


def log_softmax(logits, temperature, banned):
    """[V] log-probs with banned ids at -inf, in float64."""
    logits = np.array(logits) / temperature
    logits[banned] = -np.inf
    top = logits.max()
    return logits - top - math.log(np.exp(logits - top).sum())


def kept_by_truncation(logprobs, top_k, top_p):
    """bool [V]: the k likeliest, then the smallest set of those that holds top_p (ties to the lower id)."""
    order = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))
    order = [i for i in order if logprobs[i] > -np.inf]
    if top_k:
        order = order[:top_k]
    probabilities = np.exp(logprobs[order])
    probabilities /= probabilities.sum()
    kept, mass = np.zeros(len(logprobs), dtype=bool), 0.0
    for i, p in zip(order, probabilities):
        if mass >= top_p:
            break
        kept[i] = True
        mass += p
    return kept


def draw(raw, sampled, uniform, temperature):
    """Token id: the likeliest, or the first whose cumulative probability exceeds the uniform number."""
    if temperature == 0:
        return int(np.argmax(raw))
    cumulative, probabilities = 0.0, np.exp(sampled)
    total = probabilities.sum()
    for token, p in enumerate(probabilities):
        cumulative += p
        if cumulative > uniform * total:
            return token
    raise AssertionError("a uniform below 1 always meets a token")


def choose(candidates, quota, decoding, lottery=None):
    """Positions to reveal; ``candidates`` maps each masked position to (confidence, entropy), ``lottery`` each to the
    number that a random order sorts by."""
    if decoding.order == "sub_blocks":
        part = min(candidates) // decoding.sub_block
        candidates = {p: c for p, c in candidates.items() if p // decoding.sub_block == part}
    chosen = choose_by_strategy(candidates, quota, decoding)
    if decoding.order == "left_to_right":
        return sorted(candidates)[: len(chosen)]
    if decoding.order == "random":
        return sorted(sorted(candidates, key=lambda p: (-lottery[p], p))[: len(chosen)])
    return chosen


def choose_by_strategy(candidates, quota, decoding):
    positions = sorted(candidates)
    if decoding.strategy == "sequential":
        return positions[:quota]
    if decoding.strategy == "entropy":
        chosen, total = [], 0.0
        for p in sorted(positions, key=lambda p: (candidates[p][1], p)):
            total += candidates[p][1]
            if chosen and total >= decoding.entropy_bound:
                break
            chosen.append(p)
        return chosen
    ranked = sorted(positions, key=lambda p: (-candidates[p][0], p))
    chosen = set(ranked[:quota])
    if decoding.strategy == "dynamic":
        chosen |= {p for p in positions if candidates[p][0] > decoding.threshold}
    return sorted(chosen)


class Changing:
    """A model whose weights change on the way: ``first`` for denoising steps up to ``switch``, ``then`` after."""

    def __init__(self, first, then, *, switch):
        self.first, self.then, self.switch = first, then, switch

    def at(self, step):
        return self.first if step <= self.switch else self.then

    def block_logits(self, clean, block, step, block_size):
        """[B, V] logits of the current block; everything under the weights of this step."""
        return staircase_logits(self.at(step), clean + block, block_size)[len(clean) :]


class ChangingWithKeptCache(Changing):
    """The same with a cache that a change of weights leaves alone.

    Clean blocks enter it with the weights of the first step after they were finished, the prompt with those of the
    first step of all. Plain transformers: its cache, its mask, one pass for each of the two purposes.
    """

    def __init__(self, first, then, *, switch):
        super().__init__(first, then, switch=switch)
        self.cache = transformers.DynamicCache()

    @torch.no_grad()
    def block_logits(self, clean, block, step, block_size):
        twin, known = self.at(step), self.cache.get_seq_length()
        if len(clean) > known:
            self._run(twin, clean[known:], known, block_size)
        found = self._run(twin, block, len(clean), block_size)
        self.cache.crop(-len(block))
        return found.double()

    def _run(self, twin, ids, start, block_size):
        query, key = torch.arange(start, start + len(ids)) // block_size, torch.arange(start + len(ids)) // block_size
        visible = (key[None, :] <= query[:, None])[None, None]
        position = torch.arange(start, start + len(ids))[None]
        out = twin(torch.tensor([ids]), attention_mask=visible, position_ids=position, past_key_values=self.cache)
        return out.logits[0]


def decode(twin, model, prompt, decoding, seed):
    """(ids of prompt, completion and terminal block; step map; log-probs; completion length; stop reason).

    ``twin`` is a plain model, or a `Changing` one.
    """
    if not isinstance(twin, Changing):
        twin = Changing(twin, twin, switch=0)
    b, mask = decoding.block_size, model.mask_id
    banned = model.suppressed_V.numpy()
    limit = (len(prompt) + decoding.max_new_tokens) // b * b
    ids, steps, logprobs, step = list(prompt), [], [], 0
    while True:
        start = len(ids) // b * b
        block = ids[start:] + [mask] * (b - (len(ids) - start))
        revealed = {}
        within = 0
        while mask in block:
            step += 1
            logits = twin.block_logits(ids[:start], block, step, b).numpy()
            base, extra = divmod(b, decoding.steps)
            quota = base + (min(within, decoding.steps - 1) < extra)
            within += 1
            drawn, candidates, lottery = {}, {}, {}
            for p in [p for p in range(b) if block[p] == mask]:
                raw = log_softmax(logits[p], 1.0, banned)
                density = raw if decoding.temperature == 0 else log_softmax(logits[p], decoding.temperature, banned)
                kept = kept_by_truncation(density, decoding.top_k, decoding.top_p)
                sampled = np.where(kept, density, -np.inf)
                sampled = sampled - math.log(np.exp(sampled).sum())
                number = uniforms(torch.tensor(seed), torch.tensor(start + p), torch.tensor(step)).item()
                token = draw(raw, sampled, number, decoding.temperature)
                ranking = sampled if decoding.confidence == "sampled" and decoding.temperature else raw
                finite = raw[raw > -np.inf]
                drawn[p] = (token, density[token])
                lottery[p] = uniforms(torch.tensor(seed), torch.tensor(start + p), torch.tensor(-1)).item()
                candidates[p] = (math.exp(ranking[token]), -(np.exp(finite) * finite).sum())
            for p in choose(candidates, quota, decoding, lottery):
                block[p] = drawn[p][0]
                revealed[p] = (step, drawn[p][1])
        for p in sorted(revealed):
            steps.append(revealed[p][0])
            logprobs.append(revealed[p][1])
        ids = ids[:start] + block
        done = ids[len(prompt) :]
        stops = [i for i, token in enumerate(done) if token in decoding.stop_ids]
        if stops or len(ids) >= limit:
            length = stops[0] + 1 if stops else len(done)
            return ids, steps, logprobs, length, "stop" if stops else "length"
