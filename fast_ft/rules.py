"""stub"""

from __future__ import annotations

from fast_ft.recipe import Recipe


def check_recipe(recipe: Recipe) -> list[str]:
    return []
