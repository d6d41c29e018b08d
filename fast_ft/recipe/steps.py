"""How many optimizer steps a recipe can have, before its rows are known. Pure."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe


def stage_steps(recipe: Recipe) -> list[int] | None:
    """Return the most optimizer steps each stage can have, or None where the recipe does not bound its rows.

    Selection may leave fewer rows than it was asked for, so these are upper bounds.
    """
    steps = epoch_steps(recipe)
    if steps is None or recipe.train.max_steps is None:
        return steps
    ends = [min(end, recipe.train.max_steps) for end in accumulate(steps, initial=0)]
    return [end - start for start, end in pairwise(ends)]


def epoch_steps(recipe: Recipe) -> list[int] | None:
    """Return the most steps that each stage's epochs take, whatever train.max_steps is."""
    limits = [limit for limit in (recipe.select.take, policy_ntu_hw5.max_train_rows(recipe)) if limit is not None]
    if not limits:
        return None
    often = max(source.weight for source in recipe.data.sources)
    rows, batch = math.ceil(min(limits) * often), recipe.train.effective_batch_size
    steps, before = [], 0.0
    for stage in recipe.curriculum.stages:
        share = 1.0 if stage.upto is None else stage.upto - (0.0 if recipe.curriculum.cumulative else before)
        before = stage.upto or before
        held = min(rows, math.ceil(round(rows * share, 6)))
        steps.append(math.ceil(held / batch) * (stage.num_train_epochs or recipe.train.num_train_epochs))
    return steps or [math.ceil(rows / batch) * recipe.train.num_train_epochs]
