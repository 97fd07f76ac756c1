"""How a rollout decodes: one small value that travels with every request batch and beside every score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

Strategy = Literal["dynamic", "static", "sequential", "entropy"]
ConfidenceSource = Literal["raw", "sampled"]
Order = Literal["learned", "left_to_right", "random", "sub_blocks"]


@dataclass(frozen=True, slots=True)
class Variant:
    """What one sample does otherwise than the settings of its batch; None: nothing."""

    threshold: float | None = None
    """Dynamic: another threshold."""
    sub_block: int | None = None
    """Decode in sub-blocks of this size (`Decoding.order`) where the block is larger."""

    def __str__(self) -> str:
        """For people."""
        threshold = [] if self.threshold is None else [f"threshold {self.threshold:g}"]
        sub_block = [] if self.sub_block is None else [f"sub-blocks of {self.sub_block}"]
        return ", ".join(threshold + sub_block) or "as the stage says"


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoding settings of one batch of requests (algorithm reference 2.3)."""

    block_size: int
    """B, positions denoised together."""
    max_new_tokens: int
    """Cap on completion tokens; aligned down to the grid."""
    stop_ids: tuple[int, ...]
    """Any of these ends the completion once its block is finished."""
    strategy: Strategy = "dynamic"
    """``static``: a fixed number a step, the most confident first; ``dynamic``: all above the threshold, at
    least the static number; ``sequential``: the static number, left to right; ``entropy``: the most certain
    ones while their summed entropy stays under the bound, at least one."""
    denoising_steps: int | None = None
    """Steps a block may take under a static quota of B / steps tokens each; None means B (at least 1 a step)."""
    threshold: float = 0.9
    """Dynamic: reveal where the confidence is strictly above this."""
    entropy_bound: float = 0.35
    """Entropy: bound on the summed entropy (nats) of what one step reveals."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample within the smallest set of tokens that holds this probability."""
    confidence: ConfidenceSource = "raw"
    """Confidence of a sampled token: its probability under the plain softmax at temperature 1 (``raw``), or
    under the tempered and truncated distribution it was drawn from (``sampled``)."""
    order: Order = "learned"
    """Which masked positions a step reveals, once the strategy has said how many: those it ranks first (``learned``),
    the leftmost, or a random order fixed by the sample's seed. ``sub_blocks`` applies the strategy within the leftmost
    unfinished sub-block, as a decoder with smaller blocks does. All but ``learned`` are for ablations."""
    sub_block: int = 4
    """Size of those sub-blocks; the last of a block may be smaller."""

    def __post_init__(self) -> None:
        names = {"strategy": Strategy, "confidence": ConfidenceSource, "order": Order}
        for name, allowed in ((name, get_args(kind)) for name, kind in names.items()):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}; must be at least 1")
        if not 1 <= self.steps <= self.block_size:
            raise ValueError(f"denoising_steps={self.denoising_steps}; must lie in 1..block_size={self.block_size}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature} (>= 0), top_k={self.top_k} (>= 0), top_p={self.top_p} (in (0, 1])"
            )
        if self.sub_block < 1:
            raise ValueError(f"sub_block={self.sub_block}; must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From its fields as JSON has them."""
        return cls(**{**values, "stop_ids": tuple(values["stop_ids"])})

    def varied(self, variant: Variant | None) -> Decoding:
        """The settings of a sample with a variant of its own."""
        own = self
        if variant and variant.threshold is not None:
            own = replace(own, threshold=variant.threshold)
        if variant and variant.sub_block is not None and variant.sub_block < self.block_size:
            own = replace(own, order="sub_blocks", sub_block=variant.sub_block)
        return own

    @property
    def steps(self) -> int:
        """Denoising steps a block may take."""
        return self.block_size if self.denoising_steps is None else self.denoising_steps

    def quota(self, step: int) -> int:
        """Tokens that step ``step`` (0-based in its block) reveals at least: B // steps, the rest to the first."""
        base, extra = divmod(self.block_size, self.steps)
        return base + (step < extra)

    def describe(self) -> str:
        """One line to print next to a score."""
        rule = {
            "dynamic": f"dynamic > {self.threshold:g}",
            "static": f"static {self.steps} steps",
            "sequential": f"sequential {self.steps} steps",
            "entropy": f"entropy <= {self.entropy_bound:g}",
        }[self.strategy]
        sampling = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        order = {
            "learned": "",
            "left_to_right": ", forced left to right",
            "random": ", forced random order",
            "sub_blocks": f", forced in sub-blocks of {self.sub_block}",
        }[self.order]
        return f"B={self.block_size}, {rule}{order}, {sampling}, at most {self.max_new_tokens} new tokens"
