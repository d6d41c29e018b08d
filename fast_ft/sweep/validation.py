"""The validation set of a sweep: rows drawn once, before any selection, that no trial trains on; never a test prompt.

It is kept as an ordinary prompt file whose answers are the references, so that a trial is an ordinary run: data.test
and judge.references name it, data.exclude keeps its rows out of the selection. Rows are told by text, never by id.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fast_ft import atomic, data, exclude, rules, selection, template
from fast_ft.data import Example
from fast_ft.errors import InputError
from fast_ft.prepare import Prepared
from fast_ft.recipe import Recipe, Select


def draw(recipe: Recipe) -> list[Example]:
    """Draw search.prompts rows, by the recipe's seed, from those that pass select.where and search.where.

    No two have the same prompt; none is a test prompt; each has room for its answer in the model's context.
    """
    search = recipe.search
    assert search is not None
    encoder = template.load_encoder(recipe.model)
    pool, _ = exclude.without(data.load_pool(recipe.data), [*recipe.data.exclude, *test_digests(recipe)])
    section = Select(where={**recipe.select.where, **search.where}, deduplicate="none")
    found = selection.select(pool, section, seed=recipe.seed, limit=None, token_counter=encoder.count)
    different = {exclude.text_digest(example.prompt): example for example in reversed(found.examples)}
    fitting = [e for e in reversed(different.values()) if len(encoder.row(e).input_ids) <= recipe.model.max_length]
    needed = search.prompts + (recipe.select.take or rules.max_train_rows(recipe) or 1)
    if len(fitting) < needed:
        raise InputError(
            f"search.prompts: {search.prompts} validation rows and {needed - search.prompts} to train on are more than "
            f"the {len(fitting)} different prompts of {recipe.data.train} that pass select.where and search.where. "
            "Lower search.prompts, or loosen a condition."
        )
    drawn = random.Random(f"{recipe.seed}/validation").sample(range(len(fitting)), search.prompts)
    return [fitting[index] for index in sorted(drawn)]


def test_digests(recipe: Recipe) -> set[str]:
    """Return the digests of the test prompts' texts."""
    return exclude.digests_of(data.load_prompts(recipe.data.test)[0]) if recipe.data.test else set()


def write(path: Path, rows: Collection[Example]) -> None:
    """Write rows as a prompt file with answers."""
    content = [
        {
            "id": row.id,
            "conversations": [{"from": "human", "value": row.prompt}, {"from": "gpt", "value": row.response}],
        }
        for row in rows
    ]
    atomic.write_text(path, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n]\n")


def proof(prepared: Prepared, validation: Collection[str], test: Collection[str]) -> dict[str, Any]:
    """Return which digests a trial's training prompts have, and those in common with validation and test prompts."""
    own = sorted({exclude.text_digest(example.prompt) for example in prepared.examples})
    return {"rows": own, "in_validation": sorted({*own} & {*validation}), "in_test": sorted({*own} & {*test})}
