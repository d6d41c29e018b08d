"""With which settings the answers and scores in a run folder were made; its recipe alone does not tell."""

from __future__ import annotations

from typing import Any


def as_made(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's recipe with the settings that the answers and scores in the folder were made with.

    `generate` and `judge` can make them again with other settings than the recipe's.
    """
    recipe, phases = dict(manifest.get("recipe", {})), manifest.get("phases", {})
    for phase, section, record in (("generate", "generate", "generated_with"), ("judge", "judge", "judged_with")):
        if phase in phases and section in recipe:
            given = manifest.get(record, {})
            # base_prompts says which answers there are, and no judge changes that
            recipe[section] = {
                key: value if key == "base_prompts" else given.get(key, value) for key, value in recipe[section].items()
            }
    test = manifest.get("generated_with", {}).get("test")  # an older version answered other prompts into pred.json
    if "generate" in phases and test is not None:
        recipe["data"] = recipe.get("data", {}) | {"test": test}
    return recipe
