"""Held-out accuracy and tokens per forward, with the decoding settings they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tstar_ray.decoding import Decoding
from tstar_ray.scores import wilson_interval
from tstar_ray.trajectory import Group, tokens_per_forward


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model decoded one way on n held-out problems."""

    decoding: Decoding
    """How."""
    problems: int
    """n: problems with a verdict."""
    unscored: int
    """Problems without one (verifier failed on every attempt); in no average."""
    accuracy: float
    """Share of correct answers."""
    low: float
    """Lower end of the 95 % Wilson interval of the accuracy."""
    high: float
    """Upper end."""
    tpf: float
    """Tokens per forward, without commits."""
    tpf_with_commits: float
    """Tokens per forward of a decoder that commits every block in a pass of its own."""
    truncated: float
    """Share of completions that hit the length cap."""
    mean_tokens: float
    """Mean completion length."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(groups: Sequence[Group], decoding: Decoding, *, unscored: int) -> Evaluation:
    """Score collected groups; every sample counts."""
    samples = [sample for group in groups for sample in group.samples]
    trajectories = [sample.trajectory for sample in samples]
    count = len(samples)
    correct = sum(sample.verdict == "correct" for sample in samples)
    low, high = wilson_interval(correct, count)
    return Evaluation(
        decoding=decoding,
        problems=count,
        unscored=unscored,
        accuracy=correct / max(count, 1),
        low=low,
        high=high,
        tpf=tokens_per_forward(trajectories, commits=False),
        tpf_with_commits=tokens_per_forward(trajectories, commits=True),
        truncated=sum(t.stop_reason == "length" for t in trajectories) / max(count, 1),
        mean_tokens=sum(t.completion_len for t in trajectories) / max(count, 1),
    )
