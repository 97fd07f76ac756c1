"""What the trace viewer shows: some answers of some updates, token by token, with the step that revealed each.

Chosen: the first and last update of every stage and some between, in each the problems whose samples disagree most,
and of those one right and one wrong answer. A bound on tokens keeps the page small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tstar_ray.config import ModelConfig
from tstar_ray.run_folder import RunFolder
from tstar_ray.samples import Decode, decoder
from tstar_ray.stage_settings import rollout_variants
from tstar_ray.traces import read_traces
from tstar_ray.trajectory import Group, Sample

UPDATES, PROBLEMS, TOKENS = 14, 6, 120_000
"""Bounds of a page: updates, problems in each, tokens in all."""


def load_decoder(model: ModelConfig) -> tuple[Decode, str]:
    """How ids become text, and a note where they cannot."""
    from tstar_ray.model_files import inspect_checkpoint

    try:
        tokenizer, _ = inspect_checkpoint(model.path, mask_token_id=model.mask_token_id)
    except Exception as error:  # a page with ids is better than none
        return lambda ids: "".join(f"⟨{i}⟩" for i in ids), f"tokens are shown as ids: {str(error)[:200]}"
    return decoder(tokenizer), ""


def viewer_data(run: RunFolder, decode: Decode) -> dict[str, Any]:
    """JSON of the viewer: ``texts`` holds every distinct token once, and samples refer to them by index."""
    table: dict[int, int] = {}
    texts: list[str] = []

    def index(token: int) -> int:
        if token not in table:
            table[token] = len(texts)
            texts.append(decode([token]))
        return table[token]

    variants = [str(variant) for variant in rollout_variants(run.config)] or [""]
    chosen: list[dict[str, Any]] = []
    tokens = 0
    for update, stage in _updates(run):
        path = run.traces(update)
        assert path is not None, "only updates with traces are chosen"
        problems = []
        for group in _problems(read_traces(path)):
            samples = _samples(group)
            size = sum(len(s.trajectory.token_ids) for s in samples)
            if tokens + size > TOKENS and chosen:
                continue
            tokens += size
            problems.append(
                {
                    "question": group.problem.question,
                    "answer": group.problem.answer,
                    "right": sum(s.verdict == "correct" for s in group.samples),
                    "of": len(group.samples),
                    "samples": [
                        _sample(s, index, decode) | {"how": variants[s.trajectory.sample % len(variants)]}
                        for s in samples
                    ],
                }
            )
        if problems:
            chosen.append({"update": update, "stage": stage, "problems": problems})
    return {"texts": texts, "updates": chosen}


def _updates(run: RunFolder) -> list[tuple[int, str]]:
    """Updates with traces: both ends of every stage, then the ones that halve the largest gaps."""
    stages = [(s.stage.name, [u for u in s.updates if run.traces(u)]) for s in run.stages]
    names = {u: name for name, updates in stages for u in updates}
    every = sorted(names)
    picked = {u for _, updates in stages for u in (updates[:1] + updates[-1:])}
    while len(picked) < min(UPDATES, len(every)):
        edges = sorted(picked)
        left, right = max(pairwise(edges), key=lambda gap: gap[1] - gap[0], default=(edges[0], every[-1]))
        between = [u for u in every if left < u < right]
        if not between:
            break
        picked.add(between[len(between) // 2])
    return [(u, names[u]) for u in sorted(picked)]


def _problems(groups: Sequence[Group]) -> list[Group]:
    """Those whose samples disagree most first; ties in the order of dispatch."""

    def agreement(group: Group) -> float:
        return abs(sum(s.verdict == "correct" for s in group.samples) / len(group.samples) - 0.5)

    return sorted(groups, key=agreement)[:PROBLEMS]


def _samples(group: Group) -> list[Sample]:
    """The first right and the first wrong one, or the first two."""
    right = [s for s in group.samples if s.verdict == "correct"]
    wrong = [s for s in group.samples if s.verdict != "correct"]
    return [*right[:1], *wrong[:1]] if right and wrong else list(group.samples[:2])


def _sample(sample: Sample, index: Callable[[int], int], decode: Decode) -> dict[str, Any]:
    t = sample.trajectory
    tail = t.prompt_len // t.block_size * t.block_size
    return {
        "verdict": sample.verdict,
        "stop": t.stop_reason,
        "B": t.block_size,
        "prompt": decode(t.token_ids[: t.prompt_len].tolist()),
        # Where the first decoded block begins before the answer: prompt tokens share it.
        "offset": t.prompt_len - tail,
        "length": t.completion_len,
        "tokens": [index(int(i)) for i in t.token_ids[t.prompt_len :]],
        "steps": t.step_map.tolist(),
        "p": [round(float(p), 3) for p in np.exp(t.logprobs)],
    }
