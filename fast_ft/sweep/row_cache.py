"""Selected and tokenised rows that are kept from one trial to the next."""

from __future__ import annotations

from fast_ft.data import curriculum
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.recipe.schema import Recipe


class RowCache:
    """Rows that are tokenised once: trials that differ in stages, training or decoding share them."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._prepared: PreparedData | None = None

    def prepared(self, recipe: Recipe) -> PreparedData:
        """Return what `prepare` returns, made from the rows of the trial before where these are the same."""
        needed = curriculum.metrics_needed(recipe.curriculum)
        typed = recipe.typed("select.deduplicate")
        key = repr([recipe.model, recipe.data, recipe.select, recipe.seed, recipe.rules, needed, typed])
        if key == self._key and self._prepared is not None:
            return self._prepared.restaged(recipe)
        self._prepared, self._key = prepare(recipe), key
        return self._prepared
