"""Selected rows as stages and steps: a pure function of the rows, the prompts and the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.data import contamination, curriculum, encoding
from fast_ft.data.batches import StageJob, batches, epochs_within
from fast_ft.data.curriculum import Stage
from fast_ft.data.encoding import EncodedRow, Encoder
from fast_ft.data.examples import Example, Prompt
from fast_ft.data.selection import Selection
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Staging:
    """The stages, what contamination.certificate says of their rows, and notes on the stages, in sentences."""

    stages: list[Stage]
    leakage: dict[str, Any]
    notes: list[str]


def stage(recipe: Recipe, selection: Selection, prompts: Sequence[Prompt]) -> Staging:
    """Return the stages of a recipe's curriculum over the selected rows.

    Raises:
        InputError: the curriculum does not fit the rows, or the recipe's rules allow fewer rows.
    """
    section = recipe.curriculum
    stages = curriculum.build_stages(section, recipe.train, selection, policy_ntu_hw5.max_train_rows(recipe))
    spreads = curriculum.stage_spreads(section, selection, stages)
    examples = distinct(stages)
    if recipe.rules is not None and (broken := policy_ntu_hw5.check_rows(len(examples))):
        raise InputError("\n".join(broken))
    return Staging(
        stages, contamination.certificate(examples, prompts), list(curriculum.alike_stages(section, spreads))
    )


def jobs(
    recipe: Recipe, stages: Sequence[Stage], selection: Selection, rows: Mapping[str, EncodedRow], encoder: Encoder
) -> list[StageJob]:
    """Return the stages as rows and batches, ready to train; train.max_steps is over all of them.

    rows: the selected rows, tokenised, by id.
    """
    jobs, section, seen = [], recipe.train, weights(selection)
    left = section.max_steps
    for index, each in enumerate(stages):
        size, often = section.effective_batch_size, [seen[example.id] for example in each.examples]
        epochs, shuffled = epochs_within(each, often, size, left), each.order == "shuffled"
        steps = batches(len(often), epochs, size, shuffled=shuffled, seed=recipe.seed, stage=index, weights=often)
        steps = steps[:left]
        left = None if left is None else left - len(steps)
        trained = [rows[example.id] for example in each.examples]
        if not section.completion_only_loss:
            trained = [_all_trained(rows[example.id], example, encoder) for example in each.examples]
        if steps:
            jobs.append(StageJob(index, each.name, trained, steps, each.learning_rate))
    return jobs


def _all_trained(row: EncodedRow, example: Example, encoder: Encoder) -> EncodedRow:
    """Return a row that is trained on prompts too, but not on answers whose loss is off."""
    if all(each.trained for each in example.messages if each.role == "assistant"):
        return replace(row, labels=list(row.input_ids))
    return encoding.labelled(example.id, encoder.conversation(example), but_untrained=True)


def weights(selection: Selection) -> dict[str, float]:
    """Return how often an epoch sees each selected row, by id."""
    seen = selection.pool.weights(selection.indices)
    return dict(zip((example.id for example in selection.examples), seen, strict=True))


def distinct(stages: Sequence[Stage]) -> list[Example]:
    """Return the distinct training rows, in the order in which stages first use them."""
    return list({example.id: example for stage in stages for example in stage.examples}.values())
