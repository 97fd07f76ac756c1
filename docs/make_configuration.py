"""Write docs/configuration.md from the configuration types: python docs/make_configuration.py [--check]."""

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from tstar_ray.config import Config
from tstar_ray.config_adapt import AdaptConfig
from tstar_ray.config_evaluate import EvaluateConfig
from tstar_ray.config_experiment import ExperimentConfig

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Generated from `tstar_ray/config*.py` by `docs/make_configuration.py`. Settings come from a YAML file (`--config`), then
from `section.key=value` arguments, and are written as in YAML: lists `[4,8,16]`, mappings `{role: learner}`, nothing
(None) `null`, empty text as `key=`. `--print-config` shows all of them as a command would use them.
"""
COMMANDS: dict[str, type[BaseModel]] = {
    "tstar_ray.run": Config,
    "tstar_ray.evaluate": EvaluateConfig,
    "tstar_ray.adapt": AdaptConfig,
    "tstar_ray.experiment": ExperimentConfig,
}


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    match value:
        case BaseModel():
            return shown(value.model_dump(exclude_defaults=True))
        case tuple() | list():
            return f"[{', '.join(map(shown, value))}]"
        case dict():
            return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Path():
            return shown("" if value == Path() else str(value))
        case _:
            return str(value) or "''"


def inner(annotation: Any) -> type[BaseModel] | None:
    """The section that a list or mapping holds, if it does."""
    found = (arg for arg in get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel))
    return next(found, None)


def tables(section: type[BaseModel], prefix: str, told: dict[type[BaseModel], str]) -> str:
    """One section and those in it as Markdown; ``told``: sections that the page has, and where."""
    if section in told:
        return f"\n### {prefix.rstrip('.')}\n\nAs [{told[section]}](#{anchor(told[section])}) above.\n"
    told[section] = title = prefix.rstrip(".") or "without a section"
    rows, nested = [], ""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested += tables(field.annotation, f"{prefix}{name}.", told)
            continue
        listed = inner(field.annotation)
        if listed:
            key = f"{prefix}{name}.NAME." if str(field.annotation).startswith("dict") else f"{prefix}{name}[]."
            nested += tables(listed, key, told)
        default = "(required)" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    meaning = " ".join((section.__doc__ or "").split())
    head = f"\n### {title}\n\n{meaning}\n\n| setting | default | meaning |\n|---|---|---|\n"
    return (head + "\n".join(rows) + "\n" if rows else "") + nested


def anchor(title: str) -> str:
    """GitHub's link to a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in "_-")


def page() -> str:
    """The whole page."""
    told: dict[type[BaseModel], str] = {}
    return HEAD + "".join(f"\n## python -m {command}\n{tables(kind, '', told)}" for command, kind in COMMANDS.items())


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
