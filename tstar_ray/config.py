"""Everything configurable: typed, nested, validated before anything heavy is imported.

    defaults ──► YAML file ──► key=value overrides ──► Config (frozen) ──► run folder/config.yaml

Importing this module imports no torch, ray or vllm. A bad key or value raises `ConfigError`, which names the
key, the value and what is allowed. The defaults are the embedded run: T* from B=4 to B=16 on two CPU cores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from tstar_ray.config_actors import ActorsConfig as ActorsConfig
from tstar_ray.config_base import ConfigError as ConfigError
from tstar_ray.config_base import Section
from tstar_ray.config_curriculum import CurriculumConfig as CurriculumConfig
from tstar_ray.config_curriculum import Stage as Stage
from tstar_ray.config_learner import LearnerConfig as LearnerConfig
from tstar_ray.config_learner import LossConfig as LossConfig
from tstar_ray.embedded import EMBEDDED as EMBEDDED
from tstar_ray.settings import load_settings, to_yaml

ARITHMETIC = "arithmetic"
BOXED_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def default_prompt(source: str) -> str:
    """Of problems from a source whose prompt is left empty."""
    return "{question}" if source == ARITHMETIC else BOXED_PROMPT


class FolderConfig(Section):
    """A training and its folder."""

    name: str = ""
    """Name of the run folder; empty: date, time and curriculum mode."""
    dir: Path = Path("runs")
    """Parent of run folders; made absolute. In a `ray job` give an absolute path that outlives the job."""
    seed: int = Field(20_11_14, ge=0)
    """Seed of problem order, sampling and training."""
    resume: Path | None = None
    """Run folder to continue from its newest valid checkpoint, with the settings it was begun with but for those that
    this command gives. `auto`: the folder run.dir/run.name if it holds a run, else a new one, so that the same command
    continues after any kill."""
    checkpoint_every: int = Field(20, ge=1)
    """Updates between checkpoints; every stage change writes one too."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where numbers, samples and figures are shown besides the run folder; wandb needs `pip install -e '.[wandb]'`.
    """

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("use letters, digits, dot, dash and underscore only, at most 100")
        return name


class RunConfig(FolderConfig):
    """The run and its folder."""

    save_traces: bool = True
    """Write every update's trajectories as Parquet."""
    report: bool = True
    """Write report.html at the end; `python -m tstar_ray.report` does so at any time."""


class ModelConfig(Section):
    """The policy."""

    path: str = EMBEDDED
    """`embedded`, a local checkpoint folder (made absolute), or a hub name such as JetLM/SDAR-4B-Chat."""
    mask_token_id: int | None = Field(None, ge=0)
    """Mask token; None: from the checkpoint's config or tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights in rollouts and training; auto: float32 on CPU, bfloat16 on GPU."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        # Actors that join a running cluster work in another folder.
        return os.path.abspath(path) if path not in ("", EMBEDDED) and os.path.isdir(path) else path


def _has_placeholder(prompt: str) -> str:
    if prompt and "{question}" not in prompt:
        raise ValueError("needs the placeholder {question}")
    return prompt


Prompt = Annotated[str, AfterValidator(_has_placeholder)]


class DataConfig(Section):
    """Problems to train on and to hold out."""

    train: str = ARITHMETIC
    """`arithmetic` (built in), a .jsonl or .parquet file, or a hub data set such as openai/gsm8k."""
    eval: str = ""
    """Held-out problems, same forms; empty: the built-in held-out split, or the end of the training file. Training
    problems with the same question are left out."""
    subset: str = ""
    """Hub data sets: configuration name, e.g. main."""
    train_split: str = "train"
    """Hub data sets: split to train on."""
    eval_split: str = "test"
    """Hub data sets: split to evaluate on."""
    question_field: str = "question"
    """Column with the question."""
    answer_field: str = "answer"
    """Column with the final answer."""
    answer_after: str = "####"
    """Where the answer column holds the working too: the answer is what follows the last of these marks."""
    prompt: Prompt = ""
    """Prompt with a {question} placeholder; empty: the bare question for `arithmetic`, else a request to reason
    step by step and box the answer. The tokenizer's chat template is applied around it where it has one."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are left out, and counted."""
    limit: int = Field(0, ge=0)
    """Use only the first so many training problems; 0: all."""


class VariantConfig(Section):
    """How some samples of a group are decoded otherwise than the stage says."""

    threshold: float | None = Field(None, ge=0, le=1)
    """`dynamic`: another threshold."""
    sub_block: int | None = Field(None, ge=1)
    """Sub-blocks of this size, one after the other, where the block is larger; the model still sees the whole block."""


class RolloutConfig(Section):
    """What is sampled for one update."""

    problems: int = Field(64, ge=1)
    """Groups an update trains on."""
    group_size: int = Field(8, ge=2)
    """G, samples a problem."""
    max_staleness: int = Field(0, ge=0)
    """Largest distance in weight versions between a trained token and the learner. 0: rollouts and updates take
    turns; n: batches are decoded up to n updates ahead, while the learner works."""
    refill: int = Field(0, ge=0)
    """Times an update samples further problems in place of groups that were filtered."""
    max_new_tokens: int = Field(96, ge=1)
    """Cap on completion tokens, aligned down to the block grid."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    confidence: Literal["raw", "sampled"] = "raw"
    """Confidence of a token: its probability at temperature 1, or under the distribution it was drawn from."""
    entropy_bound: float = Field(0.35, gt=0)
    """`entropy` unmasking: bound in nats."""
    variants: tuple[VariantConfig, ...] = ()
    """Ways to decode within one group, e.g. [{}, {sub_block: 4}]: sample i takes entry i modulo their number. Bold and
    careful answers to one problem give contrast where all bold ones fail. Empty: all as the stage says."""
    max_attempts: int = Field(3, ge=1)
    """Times a sample whose engine or verifier failed is tried before its group counts as failed."""


class RewardConfig(Section):
    """Reward actors."""

    count: int = Field(1, ge=1)
    """Reward actors."""
    workers: int = Field(1, ge=1)
    """Verifier processes an actor runs."""
    deadline_s: float = Field(10.0, gt=0)
    """Seconds one verification may take from its dispatch; then the process is killed."""
    grader: str = "reward.grading:grade"
    """Function (text, answer) -> Verdict, as module:name."""
    score_truncated: bool = False
    """Whether a completion cut at the length cap may earn a reward; otherwise it earns 0, whatever it says."""
    cpus: float = Field(0.5, gt=0)
    """CPU cores a reward actor takes."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a reward actor's node must have, e.g. {ray.io/accelerator-type: H100}; see `ray start --labels`."""


class EvalConfig(Section):
    """Held-out evaluation."""

    problems: int = Field(512, ge=1)
    """Problems of the start and end tables."""
    blocks: tuple[int, ...] = ()
    """Block sizes of the tables; empty: those of the curriculum."""
    every: int = Field(10, ge=0)
    """Updates between evaluations at the stage's train block; 0: only where a gate needs one, and at the ends."""
    problems_during: int = Field(128, ge=1)
    """Problems of evaluations during training."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


class ClusterConfig(Section):
    """The Ray cluster."""

    address: str = ""
    """Cluster to join, e.g. auto or HOST:PORT; empty: RAY_ADDRESS if set, else a private cluster."""
    dashboard: bool = False
    """Private cluster: serve the Ray dashboard."""
    dashboard_port: int = Field(8265, ge=1, le=65535)
    """Private cluster: its port."""
    start_timeout_s: float = Field(180, gt=0)
    """Seconds within which actors must be placed and ready."""
    autoscaling: bool = False
    """Nodes may join for what the cluster has no room for: it is asked for all the same, and stays pending until they
    do. The run begins once the learner and one actor of each kind are ready."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    actors: ActorsConfig = ActorsConfig()
    reward: RewardConfig = RewardConfig()
    learner: LearnerConfig = LearnerConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def eval_blocks(self) -> tuple[int, ...]:
        """Block sizes of the tables, ascending."""
        if self.eval.blocks:
            return tuple(sorted(self.eval.blocks))
        curriculum = self.curriculum
        if curriculum.stages:
            return tuple(sorted({block for s in curriculum.stages for block in (s.rollout_block, s.train_block)}))
        return curriculum.blocks

    @property
    def served_actors(self) -> ActorsConfig:
        """``actors`` with the block size and length that vLLM must be started for filled in."""
        vllm, (block, tokens) = self.actors.vllm, self._longest
        filled = {"max_block": vllm.max_block or block, "max_tokens": vllm.max_tokens or tokens}
        return self.actors.model_copy(update={"vllm": vllm.model_copy(update=filled)})

    @property
    def _longest(self) -> tuple[int, int]:
        """Largest block size and longest sequence that is decoded."""
        blocks = (*(stage.rollout_block for stage in self.curriculum.resolve()), *self.eval_blocks)
        return max(blocks), self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _vllm_holds_all(self) -> Self:
        if self.actors.engine == "vllm":
            vllm, (block, tokens) = self.actors.vllm, self._longest
            if 0 < vllm.max_block < block:
                raise ValueError(
                    f"actors.vllm.max_block={vllm.max_block} is below the largest block of {block} that is decoded; "
                    "raise it, or leave it at 0"
                )
            if 0 < vllm.max_tokens < tokens:
                raise ValueError(
                    f"actors.vllm.max_tokens={vllm.max_tokens} is below the {tokens} of data.max_prompt_tokens and "
                    "rollout.max_new_tokens together; raise it, leave it at 0, or lower one of them"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for block in {s.rollout_block for s in self.curriculum.resolve()} | set(self.eval_blocks):
            if self.rollout.max_new_tokens < block:
                raise ValueError(f"rollout.max_new_tokens={self.rollout.max_new_tokens} cannot hold a block of {block}")
        if self.learner.gpus == 0 and self.model.dtype == "bfloat16":
            raise ValueError("model.dtype=bfloat16 trains 7 to 15 times slower than float32 on CPU; use auto")
        if (self.actors.gpus == 0) != (self.learner.gpus == 0) and self.model.dtype == "auto":
            raise ValueError(
                f"actors.gpus={self.actors.gpus:g} and learner.gpus={self.learner.gpus:g}: with auto the actors "
                "and the learner would differ in dtype; set model.dtype=float32"
            )
        self._check_variants()
        level = self.learner.loss.correction.level
        samples = self.rollout.problems * self.rollout.group_size
        for stage in self.curriculum.resolve():
            imitates = stage.objective == "imitation"
            if level not in ("auto", "none") and (stage.is_bridge or stage.shrink > 1 or imitates):
                raise ValueError(
                    f"learner.loss.correction.level={level}: in stage {stage.name} (rollout block "
                    f"{stage.rollout_block}, train block {stage.train_block}, shrink {stage.shrink}, objective "
                    f"{stage.objective}) recorded log-probs are of other conditionals than those trained; use none"
                )
            if imitates and self.learner.value.kind != "none":
                raise ValueError(
                    f"stage {stage.name} has objective=imitation, which has no use for a value model; set "
                    "learner.value.kind=none"
                )
            if stage.steps_per_update and stage.steps_per_update > samples:
                raise ValueError(
                    f"stage {stage.name}: steps_per_update={stage.steps_per_update} exceeds the {samples} samples of "
                    "an update"
                )
        if self.learner.steps_per_update > samples:
            raise ValueError(
                f"learner.steps_per_update={self.learner.steps_per_update} exceeds the {samples} samples of an update"
            )
        return self

    def _check_variants(self) -> None:
        variants, group_size = self.rollout.variants, self.rollout.group_size
        if len(variants) > group_size:
            raise ValueError(f"rollout.variants has {len(variants)} entries for groups of {group_size} samples")
        for stage in self.curriculum.resolve():
            for variant in variants:
                if variant.threshold is not None and stage.strategy != "dynamic":
                    raise ValueError(
                        f"rollout.variants: threshold={variant.threshold:g} means something to dynamic unmasking "
                        f"only, and stage {stage.name} uses {stage.strategy}"
                    )

    def to_yaml(self) -> str:
        """The resolved configuration, readable by `load_config`."""
        return to_yaml(self)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, a YAML file and ``section.key=value`` overrides; raises ConfigError."""
    return load_settings(Config, path, overrides)
