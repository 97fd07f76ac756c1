"""What every section of the configuration is made of; see tstar_ray.config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be used, with the remedy; shown to the user without a traceback."""


class WorkError(RuntimeError):
    """Work that came to nothing or went wrong, though its settings can be used; shown without a traceback."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
