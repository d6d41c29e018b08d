"""The validation set of a sweep: rows drawn once, before any selection, that no trial trains on; never a test prompt.

It is kept as an ordinary prompt file whose answers are the references, so that a trial is an ordinary run: data.test
and judge.references name it, data.exclude keeps its rows out of the selection. Rows are told by text, never by id.
The test set removes no row from training. Rows that equal a test prompt are reported, as a single run reports them.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.data import contamination, dataset, encoding, mixing, selection
from fast_ft.data.encoding import Encoder
from fast_ft.data.examples import Example
from fast_ft.data.prepare import PreparedData
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe, Select


def draw(recipe: Recipe) -> list[Example]:
    """Draw search.prompts rows, by the recipe's seed, from those that pass select.where and search.where.

    No two have the same prompt, and each has room for its answer in the model's context. A row that equals a test
    prompt is passed over: it stays among the rows to train on, and another one is drawn in its place.
    """
    search = recipe.search
    assert search is not None
    encoder = encoding.load_encoder(recipe.model)
    pool, _ = contamination.without_excluded(mixing.load_pool(recipe.data), recipe.data.exclude)
    section = Select(where={**recipe.select.where, **search.where}, reject=recipe.select.reject, deduplicate="none")
    found = selection.select(pool, section, seed=recipe.seed, limit=None, token_counter=encoder.count_pool)
    different = {contamination.text_digest(example.prompt): example for example in reversed(found.examples)}
    fitting = {
        text: example
        for text, example in reversed(different.items())
        if _fits(example, encoder, recipe.model.max_length)
    }
    in_test = test_digests(recipe) & fitting.keys()
    to_train = recipe.select.take or policy_ntu_hw5.max_train_rows(recipe) or 1
    if len(fitting) < search.prompts + to_train or len(fitting) - len(in_test) < search.prompts:
        equal = f"; {len(in_test)} of these equal test prompts, which are not drawn" if in_test else ""
        raise InputError(
            f"search.prompts: {search.prompts} validation rows and {to_train} to train on are more than "
            f"the {len(fitting)} different prompts of {recipe.data.train_name} that pass select.where and search.where"
            f"{equal}. Lower search.prompts, or loosen a condition."
        )
    return _drawn(fitting, in_test, search.prompts, seeds.generator(recipe.seed, "validation"))


def test_digests(recipe: Recipe) -> set[str]:
    """Return the digests of the test prompts' texts."""
    return (
        contamination.digests_of(dataset.load_prompts(recipe.data.test, recipe.data.columns)[0])
        if recipe.data.test
        else set()
    )


def _fits(example: Example, encoder: Encoder, max_length: int) -> bool:
    """Return whether a row ends with a trained answer, and has room; a row that the template refuses has none."""
    try:
        return example.messages[-1].trained and len(encoder.row(example).input_ids) <= max_length
    except InputError:
        return False


def _drawn(rows: dict[str, Example], passed_over: set[str], count: int, chance: random.Random) -> list[Example]:
    """Draw from all rows, without a look at the test set; then others in the place of those that are passed over."""
    texts = list(rows)
    first = chance.sample(range(len(texts)), count)
    rest = sorted({*range(len(texts))} - {*first})
    order = first + chance.sample(rest, len(rest))
    taken = [index for index in order if texts[index] not in passed_over][:count]
    return [rows[texts[index]] for index in sorted(taken)]


def proof(prepared: PreparedData, validation: Collection[str], test: Collection[str]) -> dict[str, Any]:
    """Return which digests a trial's training prompts have, and those in common with validation and test prompts."""
    own = sorted({contamination.text_digest(example.prompt) for example in prepared.examples})
    return {"rows": own, "in_validation": sorted({*own} & {*validation}), "in_test": sorted({*own} & {*test})}
