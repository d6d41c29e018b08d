"""How many optimizer steps a recipe can have, before its rows are known. Pure."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe, Train


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
        steps.append(steps_of(held, batch, stage.num_train_epochs or recipe.train.num_train_epochs))
    return steps or [steps_of(rows, batch, recipe.train.num_train_epochs)]


def steps_of(rows: int, batch: int, epochs: float) -> int:
    """Return the steps of a number of epochs. Part of an epoch is rounded up to whole steps, as transformers does."""
    return math.ceil(round(epochs * math.ceil(rows / batch), 6))


def warmup_steps(section: Train, total: int) -> int:
    """Return the steps of warm-up in a schedule of `total` steps. A share of them is rounded up."""
    if section.warmup_ratio is not None:
        return math.ceil(round(section.warmup_ratio * total, 6))
    return section.warmup_steps or 0
