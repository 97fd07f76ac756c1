"""How a stage of the curriculum decodes and trains, resolved from the configuration."""

from __future__ import annotations

from learner.report import UpdateSpec
from tstar_ray.config import Config, Stage
from tstar_ray.decoding import Decoding, Variant


def stage_decoding(
    config: Config, stage: Stage | None, block: int, *, temperature: float, stop_ids: tuple[int, ...]
) -> Decoding:
    """A stage's decoding at one block size; its step count applies to its own rollout block only. None: that of the
    whole curriculum."""
    rollout, curriculum = config.rollout, config.curriculum
    own = stage is not None and block == stage.rollout_block
    return Decoding(
        block_size=block,
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=stop_ids,
        strategy=stage.strategy if stage else curriculum.strategy,
        denoising_steps=stage.denoising_steps if stage and own else None,
        threshold=stage.threshold if stage else curriculum.threshold,
        entropy_bound=rollout.entropy_bound,
        temperature=temperature,
        confidence=rollout.confidence,
    )


def rollout_variants(config: Config) -> tuple[Variant, ...]:
    """`rollout.variants` as the engines take them."""
    return tuple(Variant(v.threshold, v.sub_block) for v in config.rollout.variants)


def update_spec(config: Config, stage: Stage) -> UpdateSpec:
    """How a stage trains."""
    comparable = (
        not stage.is_bridge
        and stage.shrink == 1
        and config.learner.loss.trace == "trace"
        and stage.objective == "policy"
    )
    level = config.learner.loss.correction.level
    if level == "auto":
        level = "token" if comparable and config.rollout.max_staleness else "none"
    return UpdateSpec(
        block_size=stage.train_block,
        shrink=stage.shrink,
        lr=stage.lr or config.learner.lr,
        length_norm=config.learner.loss.length_norm or config.rollout.max_new_tokens,
        compare_recorded=comparable,
        correction=level,
        objective=stage.objective,
        steps=stage.steps_per_update,
    )
