"""Settings of the curriculum: how the block size grows, stage by stage, and what ends a stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tstar_ray.config_base import Section


class Gate(Section):
    """What ends a stage."""

    kind: Literal["steps", "plateau", "accuracy_ratio"] = "steps"
    """`steps`: after `updates`; `plateau`: rollout accuracy stopped rising; `accuracy_ratio`: held-out accuracy
    at the stage's train block reached `ratio` of the start model's at the first block. All end at `updates`."""
    updates: int = Field(30, ge=1)
    """Most updates of the stage."""
    min_updates: int = Field(5, ge=0)
    """Fewest updates before another gate than `steps` may end it."""
    window: int = Field(8, ge=2)
    """`plateau`: updates in each of the two windows that are compared."""
    min_gain: float = Field(0.005, ge=0)
    """`plateau`: ends when the mean of the last window exceeds that of the one before by less than this."""
    ratio: float = Field(0.97, gt=0)
    """`accuracy_ratio`: share of the reference accuracy."""


class Stage(Section):
    """One stage of the curriculum (algorithm reference 6.1)."""

    name: str
    """Shown everywhere, e.g. b8 or b4-8 for a bridge."""
    rollout_block: int = Field(ge=1)
    """Block size of rollouts."""
    train_block: int = Field(ge=1)
    """Block size of training; larger than the rollout block in a bridge."""
    gate: Gate = Gate()
    """What ends it."""
    strategy: Literal["dynamic", "static", "sequential", "entropy"] = "dynamic"
    """Unmasking strategy of rollouts and evaluation."""
    denoising_steps: int | None = Field(None, ge=1)
    """Steps a block may take; None: the rollout block (at least one token a step)."""
    threshold: float = Field(0.9, ge=0, le=1)
    """`dynamic`: confidence above which tokens are revealed."""
    shrink: int = Field(1, ge=1)
    """s: denoising steps merged into one training slice."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of this stage; None: learner.lr."""
    reset_optimizer: bool = False
    """Start with fresh Adam moments."""
    objective: Literal["policy", "imitation"] = "policy"
    """`policy`: TraceRL. `imitation`: maximise the likelihood of right answers only, masked at random within each
    training block, as adaptation does. In a bridge this teaches a block size that no training has touched, on the
    policy's own answers at one that it masters."""
    steps_per_update: int | None = Field(None, ge=1)
    """Optimizer steps of an update of this stage; None: learner.steps_per_update."""

    @property
    def is_bridge(self) -> bool:
        """Rolls out at the old block size, trains at the new one."""
        return self.rollout_block != self.train_block

    @model_validator(mode="after")
    def _blocks_nest(self) -> Self:
        if self.train_block % self.rollout_block:
            raise ValueError(
                f"stage {self.name}: train_block={self.train_block} is no multiple of "
                f"rollout_block={self.rollout_block}; both grids must share their lines"
            )
        if self.denoising_steps is not None and self.denoising_steps > self.rollout_block:
            raise ValueError(
                f"stage {self.name}: denoising_steps={self.denoising_steps} exceed "
                f"rollout_block={self.rollout_block}; a step reveals at least one token"
            )
        return self


class RollbackConfig(Section):
    """What happens when accuracy collapses inside a stage."""

    window: int = Field(8, ge=1)
    """Updates whose mean rollout accuracy is compared with the stage's best window."""
    drop: float = Field(0.5, gt=0, le=1)
    """Collapse: the mean lies below (1 - drop) times the best."""
    limit: int = Field(2, ge=0)
    """Rollbacks of one stage before it ends with its best weights; 0 turns rollback off."""


class CurriculumConfig(Section):
    """How the block size grows."""

    mode: Literal["tstar", "direct", "fixed"] = "tstar"
    """`tstar`: through all `blocks`; `direct`: all updates at the last block; `fixed`: all at the first."""
    blocks: tuple[int, ...] = (4, 8, 16)
    """Block sizes, growing; with bridges each a multiple of the one before."""
    updates: tuple[int, ...] = (10, 15, 40)
    """Updates at each block; one number stands for all. `direct` and `fixed` use their sum."""
    bridge_updates: int = Field(0, ge=0)
    """Updates of a bridge before each growth (rollouts at the old block, training at the new one); 0: none."""
    bridge_objective: Literal["policy", "imitation"] = "policy"
    """What bridges train, see `curriculum.stages[].objective`."""
    bridge_steps_per_update: int | None = Field(None, ge=1)
    """Optimizer steps of an update in a bridge; None: learner.steps_per_update."""
    gate: Gate = Gate()
    """Gate of every stage; its `updates` come from the list above."""
    strategy: Literal["dynamic", "static", "sequential", "entropy"] = "dynamic"
    """Of every stage."""
    threshold: float = Field(0.9, ge=0, le=1)
    """Of every stage."""
    shrink: int = Field(1, ge=1)
    """Of every stage."""
    rollback: RollbackConfig = RollbackConfig()
    """Guard against collapse."""
    stages: tuple[Stage, ...] = ()
    """Stages one by one, instead of all the above but `rollback`."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if not self.blocks:
            raise ValueError("blocks=[]; name at least one block size")
        for small, large in zip(self.blocks, self.blocks[1:]):
            if large <= small:
                raise ValueError(f"blocks={list(self.blocks)}: {large} after {small} does not grow")
            if self.bridge_updates and large % small:
                raise ValueError(
                    f"blocks={list(self.blocks)}: {large} is no multiple of {small}, as bridge_updates="
                    f"{self.bridge_updates} needs; both grids of a bridge share their lines"
                )
        if len(self.updates) not in (1, len(self.blocks)):
            raise ValueError(
                f"updates={list(self.updates)}: give one number or one for each of the {len(self.blocks)} blocks"
            )
        if min(self.updates) < 0 or sum(self.updates) == 0:
            raise ValueError(f"updates={list(self.updates)}: none may be negative, and one must be positive")
        for earlier, later in zip(self.stages, self.stages[1:]):
            if later.rollout_block < earlier.rollout_block or later.train_block < earlier.train_block:
                raise ValueError(f"stage {later.name} has smaller blocks than {earlier.name}; blocks only grow")
        return self

    def resolve(self) -> tuple[Stage, ...]:
        """The stages in order."""
        if self.stages:
            return self.stages
        updates = self.updates if len(self.updates) > 1 else self.updates * len(self.blocks)

        def stage(rollout: int, train: int, count: int) -> Stage:
            bridge = rollout != train
            name = f"b{rollout}-{train}" if bridge else f"b{train}"
            return Stage(
                name=name,
                rollout_block=rollout,
                train_block=train,
                gate=self.gate.model_copy(update={"updates": count}),
                strategy=self.strategy,
                threshold=self.threshold,
                shrink=self.shrink,
                objective=self.bridge_objective if bridge else "policy",
                steps_per_update=self.bridge_steps_per_update if bridge else None,
            )

        if self.mode != "tstar":
            block = self.blocks[-1 if self.mode == "direct" else 0]
            return (stage(block, block, sum(updates)),)
        stages: list[Stage] = []
        for index, block in enumerate(self.blocks):
            if index and self.bridge_updates:
                stages.append(stage(self.blocks[index - 1], block, self.bridge_updates))
            if updates[index]:
                stages.append(stage(block, block, updates[index]))
        return tuple(stages)
