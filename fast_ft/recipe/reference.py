"""The reference of a recipe's keys, as a Markdown page that is made from the schema: docs/recipe-reference.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fast_ft.recipe.messages import allowed, resolve, show
from fast_ft.recipe.schema import Recipe

_TOP = """\
# Every key of a recipe

This page is made from the recipe's schema by `python -m fast_ft schema --markdown`. [A recipe](recipes.md) says how the
sections go together. On the command line, a key is given by its whole name, as in `lora.r=32` and
`curriculum.stages.0.upto=0.5`.
"""


def reference_page() -> str:
    """Return the page: each section and each key with what it takes, its default and its description."""
    root = Recipe.model_json_schema()
    keys = root["properties"]
    sections = {name: inner for name, part in keys.items() if (inner := _section(part, root))}
    lines = [_TOP, "## The recipe's own keys", ""]
    for name, part in keys.items():
        if name not in sections:
            lines += _entry(name, part, required=name in root["required"], root=root)
    for name, inner in sections.items():
        lines += [f"## `{name}`", "", inner["description"], ""]
        for key, part, required in _below(name, inner, root):
            lines += _entry(key, part, required=required, root=root)
    return "\n".join(lines).rstrip()


def _below(prefix: str, section: dict[str, Any], root: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield (dotted key, its piece of the schema, whether it is required) for a section's keys, however deep."""
    for name, part in section["properties"].items():
        key = f"{prefix}.{name}"
        yield key, part, name in section.get("required", ())
        if inner := _section(part, root):
            yield from _below(key, inner, root)


def _section(part: Any, root: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section that a key holds: as its value, as each entry of its list, or as each value of its pairs."""
    if not isinstance(part, dict):
        return None
    part = resolve(part, root)
    if "properties" in part:
        return part
    inside = [*part.get("anyOf", ()), part.get("items"), part.get("additionalProperties")]
    return next((found for each in inside if (found := _section(each, root))), None)


def _entry(key: str, part: dict[str, Any], *, required: bool, root: dict[str, Any]) -> list[str]:
    description = part.get("description") or resolve(part, root)["description"]
    default = part.get("default", {})  # a default that is made afresh each time is empty
    if required:
        end = "It must be given."
    elif "$ref" in part:
        end = "Left out, each key has its default."
    else:
        end = f"Default: `{default if isinstance(default, str) else show(default)}`."
    return [f"### `{key}`", "", description, "", f"It takes {allowed(part, root)}. {end}", ""]
