"""One file for a comparison over seeds: arms, seeds, and the settings they share. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from tstar_ray.config_base import Section


class ArmConfig(Section):
    """One way to train."""

    label: str = ""
    """Name in tables and figures; empty: its key."""
    settings: tuple[str, ...] = ()
    """Settings over the shared ones, as section.key=value."""
    decode_only: bool = False
    """The start model as it is: no run of its own, its scores come from the start tables of the other arms."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.decode_only and self.settings:
            raise ValueError("decode_only takes no settings: it is what every other arm starts from")
        return self


class ExperimentConfig(Section):
    """A named comparison."""

    name: str
    """Folder under `dir`."""
    dir: Path = Path("runs/experiments")
    """Parent of experiment folders."""
    config: Path | None = None
    """YAML file with the run settings that all arms share, relative to the experiment's file; None: defaults."""
    settings: tuple[str, ...] = ()
    """Run settings over that file's, for every arm."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run of every arm for each."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """What is compared, in the order of the tables."""
    reference: str = ""
    """Arm whose score at the smallest block others are measured against; empty: the first decode_only arm."""
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Confidence thresholds at which every trained model, and the start model, is decoded once more at all of
    eval.blocks: curves of accuracy over tokens per forward. Empty: only as the runs decode."""
    parallel: int = Field(1, ge=1)
    """Runs at a time."""
    cell_timeout_s: float = Field(86_400, gt=0)
    """A run that takes longer is stopped and counts as failed."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in (self.name, *self.arms):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", name):
                raise ValueError(f"name {name!r}: use letters, digits, dot, dash and underscore only, at most 60")
        labels = [arm.label or key for key, arm in self.arms.items()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"arms: {', '.join(labels)} share a label; give each its own")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give at least one, each once")
        if all(arm.decode_only for arm in self.arms.values()):
            raise ValueError("at least one arm must train: the start model's scores come from its run")
        if self.reference and self.reference not in self.arms:
            raise ValueError(f"reference={self.reference!r} is no arm; choose one of {', '.join(self.arms)}")
        return self
