"""Settings from a YAML file and ``section.key=value`` arguments into any typed section; mistakes in plain words.

    defaults ──► a resumed run's own config.yaml ──► YAML file ──► key=value ──► section (frozen)

Every command reads its settings through `load_settings`; importing this module imports nothing heavy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from tstar_ray.config_base import ConfigError

T = TypeVar("T", bound=BaseModel)


def load_settings(
    section: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    example: str = "actors.count=4",
    below: Callable[[dict[str, Any]], Path | None] | None = None,
) -> T:
    """Merge defaults, a YAML file and ``section.key=value`` overrides; raises ConfigError.

    ``below`` gets what file and overrides give, and names a file whose settings lie under both.
    """
    merged: Any = OmegaConf.create({}) if path is None else _load(path, f"--config {path}")
    changes: list[Any] = []
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is no setting; write section.key=value, e.g. {example}")
        try:
            given = OmegaConf.from_dotlist([f"{override}''" if override.endswith("=") else override])  # empty text
        except YAMLError as error:
            raise ConfigError(f"{override!r}: what follows the sign is not readable as YAML; quote it") from error
        changes.append(given)
    try:
        merged = OmegaConf.merge(merged, *changes)
        values: Any = OmegaConf.to_container(merged, resolve=True)
        if below and (lower := below(values)):
            values = OmegaConf.to_container(OmegaConf.merge(_load(lower, str(lower)), merged), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"settings cannot be merged: {error}") from error
    return validated(section, values)


def validated(section: type[T], values: Any) -> T:
    """The section with these values; raises ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(section, e) for e in error.errors())) from None


def _load(path: str | Path, what: str) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: no such file") from error
    except Exception as error:  # YAML errors come in many classes
        raise ConfigError(f"{what}: not readable as YAML: {error}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{what}: expected sections with settings, found a list")
    return loaded


def differences(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted key -> (old value, new value), as YAML has them."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(root: type[BaseModel], error: Any) -> str:
    """One line for one pydantic error: key, value, what is allowed."""
    location = [part for part in error["loc"] if part != "function-after"]
    key = ".".join(str(part) for part in location) or "config"
    if error["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known there: {', '.join(known)}"
        return f"{key}: unknown setting; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(error["input"], (str, int, float, bool, type(None), list, tuple)):
        return f"{key}={error['input']!r}: {message}"
    if error["type"] != "value_error":
        return f"{key}: {message}"
    # A section's own check names its settings without the section.
    return f"{key}.{message}" if location and re.match(r"[a-z_.]+=", message) else message


def _known_keys(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    section: Any = root
    for part in location:
        if part not in section.model_fields:
            continue  # an index or key of a list or mapping of sections
        annotation = section.model_fields[part].annotation
        inner = (a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel))
        section = next(inner, annotation)
    return list(section.model_fields)


def to_yaml(section: BaseModel) -> str:
    """Resolved settings, readable by `load_settings`."""
    return OmegaConf.to_yaml(OmegaConf.create(section.model_dump(mode="json")))
