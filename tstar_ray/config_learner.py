"""Settings of the learner: objective, credit, value model, DeepSpeed. Part of tstar_ray.config."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tstar_ray.config_base import Section


class CorrectionConfig(Section):
    """Importance correction for the distance between the engine's recorded log-probs and the learner's."""

    level: Literal["auto", "none", "token", "step", "sequence"] = "auto"
    """What the ratio pi_old / pi_recorded is a product over: one token, the tokens of a denoising step, all. `auto`:
    one token where rollouts may be stale (rollout.max_staleness) and recorded log-probs are of the conditionals that
    are trained (no bridge, shrink 1), else none."""
    mode: Literal["clip", "mask"] = "clip"
    """`clip`: weight by min(ratio, bound); `mask`: weight 1 inside [1 / bound, bound], else 0."""
    bound: float = Field(2.0, gt=1)
    """Largest ratio that is used."""


class LossConfig(Section):
    """The TraceRL objective."""

    trace: Literal["trace", "random", "coupled"] = "trace"
    """What a token is conditioned on. `trace`: the states it was decoded from (TraceRL). Baselines: `random`
    masking at a rate drawn for each sample, or `coupled`: that mask and its complement."""
    normaliser: Literal["token_mean", "const_len", "per_step_mean", "seq_mean", "paper_sum"] = "token_mean"
    """How token terms are weighted; see learner.packing.token_weights."""
    length_norm: int = Field(0, ge=0)
    """`const_len`: tokens to divide by; 0: rollout.max_new_tokens."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """Upper clip of the ratio: 1 + clip_high."""
    kl_coef: float = Field(0.01, ge=0)
    """Weight of the KL to the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """d = log pi - log pi_ref; k1: d (its gradient is zero on average: for logging), k2: d^2 / 2, k3: e^-d - 1 + d."""
    kl_reference: Literal["old", "stage", "initial"] = "old"
    """Reference policy: before the update (no effect with one optimizer step a batch), at the start of the
    stage, or the initial model. The last two hold a frozen copy of the model on every rank."""
    correction: CorrectionConfig = CorrectionConfig()
    """Importance correction by recorded log-probs."""
    advantage: Literal["zscore", "mean", "leave_one_out"] = "zscore"
    """Group-relative advantage: divided by the population standard deviation, only centred, or leave-one-out."""
    accuracy_band: tuple[float, float] = (0.0, 1.0)
    """Groups whose mean reward lies outside (bounds kept) are filtered; groups without contrast always are.
    TraceRL uses [0.2, 0.8]."""
    speed_coef: float = Field(0.0, ge=0)
    """Weight of tokens per forward in the advantage: standardised among the correct samples of a group, and added to
    those above the mean. Needs samples that differ in speed, as `rollout.variants` makes them."""

    @field_validator("accuracy_band")
    @classmethod
    def _ordered(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= band[0] < band[1] <= 1:
            raise ValueError("give two numbers low < high in [0, 1]")
        return band

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.trace != "trace" and self.correction.level not in ("auto", "none"):
            raise ValueError(
                f"correction.level={self.correction.level} needs loss.trace=trace: recorded log-probs belong to the "
                f"decoding trace, not to {self.trace} masks"
            )
        return self


class ValueConfig(Section):
    """The value model (TraceRL); off by default."""

    kind: Literal["none", "separate", "shared"] = "none"
    """`separate`: a second backbone with its own optimizer; `shared`: a head on the policy's backbone."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate of the value model, or of the shared head."""
    coef: float = Field(0.5, gt=0)
    """`shared`: weight of the value loss beside the policy loss."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a denoising step."""
    lam: float = Field(1.0, ge=0, le=1)
    """Lambda of generalised advantage estimation over denoising steps."""
    clip: float = Field(0.2, gt=0)
    """Values may move this far from those before the update before their loss is clipped."""


def refuse_shared_gpus(ranks: int, gpus: float) -> None:
    """Raises ValueError for GPUs that a rank cannot use, and for ranks that would share one."""
    if gpus > 1:
        raise ValueError(f"gpus={gpus:g}: a rank computes on one GPU; use gpus=1 and more ranks")
    if 0 < gpus < 1 and ranks > 1:
        raise ValueError(
            f"gpus={gpus:g} with ranks={ranks}: NCCL refuses ranks that share a GPU; use gpus=1, or ranks=1"
        )


class LearnerConfig(Section):
    """The DeepSpeed worker group."""

    ranks: int = Field(1, ge=1)
    """Data-parallel ranks, one process each."""
    gpus: float = Field(0, ge=0)
    """GPUs a rank takes."""
    cpus: float = Field(1, gt=0)
    """CPU cores a rank takes; scaled down where the cluster has fewer and no GPUs are used."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a rank's node must have, e.g. {ray.io/accelerator-type: H100}; see `ray start --labels`."""
    threads: int = Field(0, ge=0)
    """Compute threads of a rank on CPU; 0: the machine's cores divided by the ranks on it."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage. 1 to 3 add up the gradients of micro-batches in fp32, 0 in the model's own dtype, as ZeRO 1
    and 2 do with offload, where fp32 would not leave the GPU."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state (ZeRO 1 to 3), or also parameters (ZeRO 3), in the CPU's memory."""
    lr: float = Field(1e-4, gt=0)
    """AdamW learning rate, constant after the warm-up."""
    warmup_updates: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Global gradient-norm bound."""
    steps_per_update: int = Field(1, ge=1)
    """Optimizer steps a batch of rollouts is split into; 1 skips the pass for old log-probs (the ratio is 1)."""
    row_tokens: int = Field(0, ge=0)
    """Tokens of one packed row (a longer trajectory gets a row of its own); 0: every trajectory a row of its own
    on CPU, where attention is split, and rows of a whole micro-batch on GPU, where it is block-sparse."""
    micro_batch_tokens: int = Field(4096, ge=16)
    """Tokens one forward and backward pass holds. A longer trajectory is cut, so that this bounds memory; each
    piece repeats the clean tokens that it sees."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    timeout_s: float = Field(1800, gt=0)
    """A learner that takes longer for one update counts as lost."""
    silent_s: float = Field(60, gt=0)
    """A rank that gives no sign of life for so long counts as lost."""
    max_restarts: int = Field(3, ge=0)
    """Times within an hour that lost ranks are replaced, and the run continues from its newest checkpoint, before it
    gives up."""
    replay: Path | None = None
    """Run one update on the trajectories of this Parquet file, as the stage that it names, print its report, and end:
    no actors, no run folder. With run.resume it starts from that run's newest checkpoint before the update."""
    loss: LossConfig = LossConfig()
    """The objective."""
    value: ValueConfig = ValueConfig()
    """The value model."""

    @property
    def fp32_gradients(self) -> bool:
        """Gradients of micro-batches are added up in fp32 whatever the model's dtype; see ``zero_stage``."""
        return self.zero_stage == 3 or (self.zero_stage > 0 and self.offload == "none")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        refuse_shared_gpus(self.ranks, self.gpus)
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload={self.offload} needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload=all needs zero_stage=3, not {self.zero_stage}; use offload=optimizer")
        if self.value.kind != "none" and self.loss.trace != "trace":
            raise ValueError(f"value.kind={self.value.kind} needs loss.trace=trace: values follow denoising steps")
        return self
