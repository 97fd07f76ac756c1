"""What a request carries through vLLM that vLLM has no name for; plain values, as its sampling parameters allow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tstar_ray.decoding import Decoding


@dataclass(frozen=True, slots=True)
class Job:
    """One completion as scheduler and sampler see it."""

    decoding: Decoding
    """How."""
    seed: int
    """Of its own random stream."""
    limit: int
    """Position where decoding must end; on the grid."""
    steps: int = 0
    """Denoising steps behind the blocks it has: where one that was preempted goes on counting."""

    def to_wire(self) -> dict[str, Any]:
        """For ``SamplingParams.extra_args``."""
        return {
            "diffusion_canvas_length": self.decoding.block_size,  # vLLM's own key
            "tstar": dataclasses.asdict(self),
        }

    @classmethod
    def from_wire(cls, extra: dict[str, Any]) -> Job:
        """The inverse; lists may have taken the place of tuples on the way."""
        values = dict(extra["tstar"])
        return cls(Decoding.from_dict(values.pop("decoding")), **values)
