"""Write docs/configuration.md from the configuration types: python docs/make_configuration.py [--check]."""

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tstar_ray.config import Config, Stage, VariantConfig

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Generated from `tstar_ray/config.py` by `docs/make_configuration.py`. Settings come from a YAML file (`--config`), then
from `section.key=value` arguments. Lists are written `[4,8,16]`, empty text as `key=`.
"""


def table(section: type[BaseModel], prefix: str) -> str:
    """One section and its nested ones as Markdown."""
    rows, nested = [], ""
    for name, field in section.model_fields.items():
        value = field.default
        if isinstance(value, BaseModel):
            nested += table(type(value), f"{prefix}{name}.")
            continue
        shown = "(required)" if value is PydanticUndefined else f"`{value!r}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {shown} | {meaning} |")
    title = " ".join((section.__doc__ or "").split())
    return (
        f"\n## {prefix.rstrip('.')}\n\n{title}\n\n| setting | default | meaning |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
        + nested
    )


def page() -> str:
    """The whole page."""
    parts = [table(type(field.default), f"{name}.") for name, field in Config.model_fields.items()]
    parts += [table(VariantConfig, "rollout.variants[]."), table(Stage, "curriculum.stages[].")]
    return HEAD + "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
