"""What goes into an update, and what it reports: sums over micro-batches, then ranks, then means."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist

from learner.credit import Objective

TAIL = 2.0
"""Ratios of engine to learner beyond this factor count as tails."""


@dataclass(frozen=True, slots=True)
class UpdateSpec:
    """What of the stage an update needs."""

    block_size: int
    """Training block."""
    shrink: int
    """Denoising steps merged into one slice."""
    lr: float
    """Learning rate after the warm-up."""
    length_norm: int
    """Tokens `const_len` divides by."""
    compare_recorded: bool
    """Report the distance to the engine's log-probs; meaningless in a bridge."""
    correction: Literal["none", "token", "step", "sequence"] = "none"
    """Level of the importance correction, see `tstar_ray.config_learner.CorrectionConfig`; not ``auto``."""
    objective: Objective = "policy"
    """``policy``: TraceRL. ``imitation``: right answers, masked at random within each training block."""
    steps: int | None = None
    """Optimizer steps of the update; None: `tstar_ray.config_learner.LearnerConfig.steps_per_update`."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Means over the target tokens that an update forwarded, unless said otherwise."""

    loss: float
    """Mean over optimizer steps of the minimised loss."""
    kl: float
    """To the reference policy (nats), see loss.kl_reference and loss.kl_estimator."""
    clip_fraction: float
    """Share of tokens whose gradient the clip took away."""
    ratio_max: float
    """Largest pi_theta / pi_old."""
    entropy: float
    """Of the policy at the targets (nats)."""
    grad_norm: float
    """Largest over optimizer steps, before clipping."""
    replay_error: float
    """Largest |log-prob before the update - recorded by the engine|; NaN in a bridge, as the next two."""
    mismatch_kl: float
    """k3 of the engine's policy to the learner's before the update (nats)."""
    ratio_tails: float
    """Share of tokens where the two differ by more than a factor of 2."""
    importance: float
    """Mean weight of the importance correction; 1 where there is none."""
    value_loss: float
    """Mean clipped value loss before its weight; NaN without a value model, as the next one."""
    explained_variance: float
    """1 - var(return - value) / var(return), values before the update."""
    lr: float
    """Of the last optimizer step."""
    steps: int
    """Optimizer steps taken."""
    samples: int
    """Trajectories trained on."""
    targets: int
    """Target tokens."""
    forwarded_tokens: int
    """Tokens of the packed rows, padding left out, each once."""
    seconds: float
    """Wall time of the update."""


class Sums:
    """Sums over micro-batches, then over ranks."""

    NAMES = (
        "loss", "kl", "clipped", "entropy", "targets", "forwarded", "mismatch", "tails", "importance",
        "value_loss", "returns", "returns2", "residual", "residual2",
    )  # fmt: skip
    MAXIMA = ("ratio", "replay_error")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.maxima = dict.fromkeys(self.MAXIMA, 0.0)

    def add(self, **values: torch.Tensor | float) -> None:
        """Add to sums by name."""
        for name, value in values.items():
            self.sums[name] += float(value)

    def top(self, **values: torch.Tensor) -> None:
        """Raise maxima by name; NaN is above everything and stays."""
        for name, value in values.items():
            number, highest = float(value), self.maxima[name]
            if not math.isnan(highest) and not number <= highest:
                self.maxima[name] = number

    def reduce(self, device: torch.device) -> None:
        """Over all ranks; collective."""
        sums, highest = (
            torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            for values in (self.sums, self.maxima)
        )
        dist.all_reduce(sums)
        self.sums.update(zip(self.sums, sums.tolist()))
        # NaN travels by itself: the maximum of two ranks may lose it.
        both = torch.stack([highest.nan_to_num(nan=0.0, posinf=torch.inf), highest.isnan().double()])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        self.maxima.update(zip(self.maxima, both[0].masked_fill(both[1] > 0, torch.nan).tolist()))

    def report(
        self,
        *,
        lr: float,
        grad_norm: float,
        steps: int,
        samples: int,
        seconds: float,
        comparable: bool,
        has_value: bool,
    ) -> UpdateReport:
        """Means of what was summed."""
        total, targets, nan = self.sums, max(self.sums["targets"], 1.0), float("nan")
        variance = total["returns2"] / targets - (total["returns"] / targets) ** 2
        unexplained = total["residual2"] / targets - (total["residual"] / targets) ** 2
        return UpdateReport(
            loss=total["loss"] / steps,
            kl=total["kl"] / targets,
            clip_fraction=total["clipped"] / targets,
            ratio_max=self.maxima["ratio"],
            entropy=total["entropy"] / targets,
            grad_norm=grad_norm,
            replay_error=self.maxima["replay_error"] if comparable else nan,
            mismatch_kl=total["mismatch"] / targets if comparable else nan,
            ratio_tails=total["tails"] / targets if comparable else nan,
            importance=total["importance"] / targets,
            value_loss=total["value_loss"] / targets if has_value else nan,
            explained_variance=1 - unexplained / variance if has_value and variance > 0 else nan,
            lr=lr,
            steps=steps,
            samples=samples,
            targets=int(targets),
            forwarded_tokens=int(total["forwarded"]),
            seconds=seconds,
        )


def report_dict(report: UpdateReport) -> dict[str, float]:
    """For logs."""
    return {name: float(value) for name, value in asdict(report).items()}
