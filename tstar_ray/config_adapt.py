"""Settings of `python -m tstar_ray.adapt`: an autoregressive checkpoint becomes a block-diffusion model.

Importing this module imports no torch, ray or transformers. The defaults are SDAR's recipe where it is known
(algorithm reference 3.2): t ~ U(0, 1) for each sample, cross-entropy over p, a constant learning rate with a
short warm-up, answers filled with end-of-text to the end of their last block, block size 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tstar_ray.config import ClusterConfig, FolderConfig, ModelConfig
from tstar_ray.config_base import Section
from tstar_ray.config_learner import LearnerConfig, refuse_shared_gpus
from tstar_ray.settings import to_yaml

MASK_TOKEN = "<|MASK|>"


class AdaptRunConfig(FolderConfig):
    """The adaptation and its folder."""

    dir: Path = Path("runs/adapt")
    """Parent of run folders; made absolute."""
    checkpoint_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps a printed row is the mean of; metrics.jsonl and the trackers have each of them."""


class AdaptModelConfig(ModelConfig):
    """The autoregressive checkpoint to start from."""

    path: str = ""
    """A local folder or hub name of a Qwen3, SDAR or Llama checkpoint; a block-diffusion one is trained on."""
    mask_token: str = MASK_TOKEN
    """Added to the tokenizer where the checkpoint has no mask token; its embedding starts as the mean of all."""


class AdaptDataConfig(Section):
    """What is trained on."""

    train: str = ""
    """A .jsonl or .parquet file, a hub data set, or `arithmetic` (built in)."""
    eval: str = ""
    """Held-out samples, same forms; empty: the end of the training data (`arithmetic`: its held-out split)."""
    subset: str = ""
    """Hub data sets: configuration name."""
    train_split: str = "train"
    """Hub data sets: split to train on."""
    eval_split: str = "test"
    """Hub data sets: split to hold out."""
    question_field: str = "question"
    """Column with the question."""
    solution_field: str = "answer"
    """Column with what is to be answered, working included."""
    answer_after: str = "####"
    """Where a solution ends in this mark and the final answer, both become \\boxed{answer}, which verifiers look for;
    other solutions, or all where this is empty, are trained on as they stand."""
    text_field: str = ""
    """Column with plain text: every token of it is trained (continued pre-training), no question, no template."""
    prompt: str = ""
    """Prompt with a {question} placeholder; empty: that of `tstar_ray.run`, the bare question for `arithmetic`, else a
    request to reason step by step and box the answer. The tokenizer's chat template is applied around it where it has
    one."""
    max_tokens: int = Field(2048, ge=8)
    """Longer questions with their solutions are left out, and counted; longer texts are cut into pieces."""
    limit: int = Field(0, ge=0)
    """Use only the first so many samples; 0: all."""
    held_out: int = Field(256, ge=0)
    """Samples held out for the loss on unseen text; 0: none."""

    @field_validator("prompt")
    @classmethod
    def _has_placeholder(cls, prompt: str) -> str:
        if prompt and "{question}" not in prompt:
            raise ValueError("needs the placeholder {question}")
        return prompt


class NoiseConfig(Section):
    """How much of a sample is masked, and what a masked token weighs."""

    schedule: Literal["linear", "cosine", "square"] = "linear"
    """Mask probability p of t ~ U(0, 1). `linear`: t; `cosine`: 1 - cos(pi t / 2), fewer masks; `square`: 1 -
    (1 - t)^2, more masks."""
    low: float = Field(1e-3, gt=0, lt=1)
    """p at t = 0: p = low + (high - low) schedule(t)."""
    high: float = Field(1.0, gt=0, le=1)
    """p at t = 1."""
    per: Literal["sample", "block"] = "sample"
    """What shares one t: a whole sample (SDAR), or each of its blocks draws its own (lower variance)."""
    weighting: Literal["ratio", "elbo", "none"] = "ratio"
    """Weight of a masked token. `ratio`: 1 / p; `elbo`: p'(t) / p, the likelihood bound under any schedule (equal to
    ratio for `linear` from 0 to 1); `none`: 1."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"noise.low={self.low} exceeds noise.high={self.high}")
        return self


class BlockStage(Section):
    """A part of the training with one mixture of block sizes."""

    steps: int = Field(0, ge=0)
    """Optimizer steps; or give `epochs`."""
    epochs: float = Field(0.0, ge=0)
    """Passes over the training samples, where `steps` is 0."""
    mixture: dict[int, float] = Field(default_factory=lambda: {4: 1.0})
    """Block size -> share of optimizer steps."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if bool(self.steps) == bool(self.epochs):
            raise ValueError("give either steps or epochs")
        if not self.mixture or min(self.mixture) < 1 or min(self.mixture.values()) <= 0:
            raise ValueError(f"mixture={self.mixture}: give positive block sizes with positive shares")
        return self


class TrainConfig(Section):
    """Optimizer, batch and DeepSpeed."""

    batch: int = Field(64, ge=1)
    """Samples an optimizer step trains on, over all ranks."""
    lr: float = Field(1e-5, gt=0)
    """AdamW learning rate after the warm-up."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all steps with a linear warm-up."""
    final_lr: float = Field(1.0, ge=0, le=1)
    """Last learning rate over `lr`; below 1 it falls along a cosine, 1 keeps it constant (SDAR)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Global gradient-norm bound."""
    ranks: int = Field(1, ge=1)
    """Data-parallel ranks, one process each."""
    gpus: float = Field(0, ge=0)
    """GPUs a rank takes; 0 trains on CPU in float32."""
    cpus: float = Field(1, gt=0)
    """CPU cores a rank takes; scaled down where the cluster has fewer and no GPUs are used."""
    threads: int = Field(0, ge=0)
    """Compute threads of a rank on CPU; 0: the machine's cores divided by the ranks on it."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state (ZeRO 1 to 3), or also parameters (ZeRO 3), in the CPU's memory."""
    row_tokens: int = Field(0, ge=0)
    """Tokens of one packed row; 0: every sample a row of its own on CPU, whole micro-batches on GPU."""
    micro_batch_tokens: int = Field(8192, ge=16)
    """Tokens one forward and backward pass holds; longer samples are cut."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    timeout_s: float = Field(1800, gt=0)
    """A step that takes longer counts as lost."""
    silent_s: float = Field(60, gt=0)
    """A rank that gives no sign of life for so long counts as lost."""

    def learner(self) -> LearnerConfig:
        """The same for the learner's DeepSpeed backend and its group of ranks."""
        shared = set(LearnerConfig.model_fields) & set(TrainConfig.model_fields)
        return LearnerConfig(**{name: getattr(self, name) for name in shared})


class AdaptConfig(Section):
    """A whole adaptation."""

    run: AdaptRunConfig = AdaptRunConfig()
    model: AdaptModelConfig = AdaptModelConfig()
    data: AdaptDataConfig = AdaptDataConfig()
    noise: NoiseConfig = NoiseConfig()
    stages: tuple[BlockStage, ...] = (BlockStage(epochs=1),)
    """Block sizes, part by part: one part with one size is SDAR's recipe, parts of growing size are TDAR's."""
    train: TrainConfig = TrainConfig()
    eval_every: int = Field(200, ge=0)
    """Optimizer steps between losses on held-out samples at every block size of the stages; 0: at the ends only."""
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.stages:
            raise ValueError("stages=[]; give at least one, e.g. stages=[{epochs: 1, mixture: {4: 1}}]")
        largest = max(self.blocks)
        if largest > self.data.max_tokens:
            raise ValueError(f"a block of {largest} tokens exceeds data.max_tokens={self.data.max_tokens}")
        refuse_shared_gpus(self.train.ranks, self.train.gpus)
        if self.train.gpus == 0 and self.model.dtype == "bfloat16":
            raise ValueError("model.dtype=bfloat16 trains 7 to 15 times slower than float32 on CPU; use auto")
        return self

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block size that occurs, ascending."""
        return tuple(sorted({block for stage in self.stages for block in stage.mixture}))

    def to_yaml(self) -> str:
        """The resolved settings, readable by `tstar_ray.settings.load_settings`."""
        return to_yaml(self)
