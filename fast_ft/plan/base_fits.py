"""Does the base model fit the recipe, its rows and its prompts? Asked before any weights are fetched or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fast_ft.common.errors import InputError
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import PreparedData
from fast_ft.data.tokenise import room_problem
from fast_ft.hub.families import FamilySpec
from fast_ft.recipe.schema import Recipe


def check(family: FamilySpec, recipe: Recipe, prepared: PreparedData | None = None, *, answers: bool = True) -> None:
    """Check that rows and, with `answers`, prompts and their answers fit the model's context and its vocabulary.

    Raises:
        InputError: something does not fit; the message names the key, or the row.
    """
    context, most = family.context, recipe.model.max_length
    if context is not None and most > context:
        raise InputError(
            f"model.max_length: {most} tokens, but the context of {recipe.model.name_or_path} has {context}: "
            f"use model.max_length={context} at most"
        )
    if prepared is None:
        return
    named = ((f"row {name!r}", row.input_ids) for name, row in prepared.rows.items())
    _check_vocabulary(family.shape.vocab_size, named)
    if answers and prepared.prompts:
        prompts = zip((f"prompt {prompt.id!r}" for prompt in prepared.prompts), prepared.prompt_ids, strict=True)
        _check_vocabulary(family.shape.vocab_size, prompts)
        check_room(context, prepared.prompts, prepared.prompt_ids, recipe.generate.max_new_tokens)


def check_room(context: int | None, prompts: Sequence[Prompt], ids: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raise InputError where a prompt and its longest answer do not fit into a context of this size."""
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if problem := room_problem(prompts[longest].id, len(ids[longest]), max_new_tokens, context):
        raise InputError(problem)


def _check_vocabulary(size: int, named: Iterable[tuple[str, Sequence[int]]]) -> None:
    for name, ids in named:
        if (largest := max(ids, default=0)) >= size:
            raise InputError(
                f"{name} holds the token {largest}, and the base model knows {size:,} tokens: the tokenizer is another "
                "model's. Leave model.tokenizer out, or name the tokenizer that belongs to the base."
            )
