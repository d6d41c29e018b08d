"""The recipe of each trial: a point of the space, a folder of its own, and what all trials share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.data.prepare import PreparedData
from fast_ft.recipe.loader import content_digest, resolved
from fast_ft.recipe.schema import Recipe, Search
from fast_ft.run.folder import differences
from fast_ft.sweep import search_space, validation_set
from fast_ft.sweep.search_space import Point


@dataclass(frozen=True)
class TrialRecipes:
    """Makes trials of `recipe` in the sweep's folder `root`.

    name: of the recipe's file. validation, test: digests of the prompts. asked: how many prompts the test set has.
    """

    recipe: Recipe
    name: str
    root: Path
    validation: tuple[str, ...]
    test: tuple[str, ...]
    asked: int

    @property
    def search(self) -> Search:
        """The recipe's search section."""
        assert self.recipe.search is not None
        return self.recipe.search

    @property
    def validation_file(self) -> Path:
        """The prompt file with the validation rows."""
        return self.root / "validation.json"

    @property
    def fixed(self) -> dict[str, Any]:
        """{key: value} that all trials share and the recipe need not have."""
        found: dict[str, Any] = {
            "data.test": str(self.validation_file),
            "data.exclude": self.excluded,
            "run_name": None,
            "backup_dir": None,  # a trial's folder alone would be no backup of the sweep
            "judge.references": str(self.validation_file),
            "judge.base_prompts": 0,
        }
        return found if self.search.objective == "judge" else found | {"judge.kind": "reference"}

    @property
    def excluded(self) -> list[str]:
        """The digests of the prompts that no trial trains on: the recipe's own, and the validation rows."""
        return sorted({*self.recipe.data.exclude, *self.validation})

    def at(self, point: Point) -> Recipe:
        """Return a trial's complete recipe: the point's values, the validation set, and a folder of its own.

        The folder's name is a digest of the recipe that does not depend on where the sweep's folder lies.
        """
        recipe = search_space.at(self.recipe, point, self.fixed)
        tree = resolved(recipe)
        tree["data"]["test"] = tree["judge"]["references"] = self.validation_file.name
        return recipe.model_copy(update={"output_dir": str(self.root / "trials" / content_digest(tree)[:8])})

    def best_at(self, point: Point) -> Recipe:
        """Return the recipe to keep: the point's values, with the recipe's own test set and judge."""
        return search_space.at(self.recipe, point, {"data.exclude": self.excluded})

    def facts(self, recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
        """Return what is kept of a trial besides its result: the proof of what it trained on, and what was changed."""
        changed = differences(resolved(self.recipe), resolved(recipe), ignore=("output_dir", *self.fixed, "judge.kind"))
        proof = validation_set.proof(prepared, self.validation, self.test)
        assert not proof["in_validation"], "data.exclude keeps the validation rows out of every selection"
        return {"proof": proof, "changed": {key: value for key, (_, value) in changed.items()}}
