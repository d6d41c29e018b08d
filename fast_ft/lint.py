"""stub"""

from __future__ import annotations

from typing import NamedTuple

from fast_ft.recipe import Recipe


class Problem(NamedTuple):
    text: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


def lint(recipe: Recipe) -> tuple[list[Problem], list[Problem]]:
    return [], []
