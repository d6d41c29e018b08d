"""Selected rows and prompts as tokens, each checked; what cannot be trained is named, or dropped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data import encoding, selection
from fast_ft.data.contract import contract_problems, lost_character
from fast_ft.data.encoding import EncodedRow, Encoder
from fast_ft.data.examples import Message, Prompt
from fast_ft.data.prompt_templates import as_message, turn_name
from fast_ft.data.taking import PassedOver
from fast_ft.hub import families
from fast_ft.recipe.schema import Recipe

_CANNOT_HOLD = "the tokenizer cannot give back {}"


def rows(
    recipe: Recipe, encoder: Encoder, chosen: selection.Selection, notes: list[str], *, are_validation: bool = False
) -> tuple[dict[str, EncodedRow], selection.Selection]:
    """Tokenise the selected rows, or the validation rows, and check each against the contract.

    data.overlong and data.unencodable may drop rows that are too long, or that the tokenizer cannot hold.
    """
    kind, use = ("validation", "measured") if are_validation else ("selected", "trained")
    made_rows, kept, long, lost, broken = {}, [], [], [], []
    remarks: Counter[str] = Counter()
    dropped: list[PassedOver] = []
    for index, example in zip(chosen.indices, chosen.examples, strict=True):
        if found := _lost(encoder, example.messages):
            lost.append(f"row {example.id!r}, {found}")
            dropped.append(PassedOver(index, "unencodable", None))
            continue
        try:
            made = encoder.conversation(example)
        except InputError as error:
            broken.append(f"row {example.id!r}, {error}")
            continue
        row = encoding.labelled(example.id, made)
        if len(row.input_ids) > recipe.model.max_length and recipe.data.overlong == "drop":
            long.append(example.id)
            dropped.append(PassedOver(index, "overlong", None))
            continue
        problems = contract_problems(row, example, encoder, recipe.model.max_length)
        broken += [f"row {example.id!r}: {problem}" for problem in problems]
        remarks.update(made.remarks)
        made_rows[example.id] = row
        kept.append(index)
    if lost and recipe.data.unencodable == "error":
        broken = lost + broken
    if broken:
        raise InputError(_first(broken, f"{kind} rows cannot be {use} as they are", recipe))
    notes += [f"{remark} ({counted(count, 'row')})" for remark, count in sorted(remarks.items())]
    if long:
        were = "was" if len(long) == 1 else "were"
        limit = f"model.max_length {recipe.model.max_length}"
        notes.append(f"{counted(len(long), f'{kind} row')} over {limit} {were} dropped")
    if lost:
        notes.append(f"{counted(len(lost), f'{kind} row')} dropped (data.unencodable), the first: {lost[0]}")
    if not kept and are_validation:
        raise InputError(
            "data.validation: all its rows were dropped, and none is left to measure. Name other rows, or raise "
            f"model.max_length ({recipe.model.max_length})."
        )
    if not kept:
        raise InputError("no row is left to train on. Loosen select.where, or raise model.max_length.")
    return made_rows, replace(chosen, indices=kept, passed_over=[*chosen.passed_over, *dropped])


def _lost(encoder: Encoder, messages: Sequence[Message]) -> str | None:
    """Return which turn holds a character that the tokenizer cannot give back, or None where none does."""
    for index, message in enumerate(messages):
        if character := lost_character(message.content, encoder):
            return f"{turn_name(messages, index)}: {_CANNOT_HOLD.format(character)}"
    return None


def prompts(recipe: Recipe, encoder: Encoder, asked: Sequence[Prompt], notes: list[str]) -> list[list[int]]:
    """Return each prompt's token ids; a note names one whose text the tokenizer changes.

    Raises InputError, also where a prompt and its answer do not fit into the model's context, as far as that is known.
    """
    context = families.context_length(recipe.model.name_or_path)
    ids, lost = [], []
    for prompt in asked:
        try:
            ids.append(encoder.prompt_ids(prompt.messages, prompt.tools))
        except InputError as error:
            raise InputError(f"{recipe.data.test}, prompt {prompt.id!r}, {error}") from None
        if problem := room_problem(prompt.id, len(ids[-1]), recipe.generate.max_new_tokens, context):
            raise InputError(f"{recipe.data.test}: {problem}")
        if found := _lost(encoder, [as_message(turn) for turn in prompt.messages]):
            lost.append(f"prompt {prompt.id!r}, {found}")
    if lost:
        more = f" ({counted(len(lost) - 1, 'other prompt')} likewise)" if len(lost) > 1 else ""
        notes.append(f"{lost[0]}; the model reads another text there{more}")
    return ids


def room_problem(name: str, tokens: int, max_new_tokens: int, context: int | None) -> str | None:
    """Return a sentence where a prompt of `tokens` and its longest answer do not fit into the model's context."""
    if context is None or tokens + max_new_tokens <= context:
        return None
    if tokens >= context:
        return (
            f"prompt {name!r} has {tokens} tokens, over the model's context of {context}: no token is left for an "
            "answer. Shorten the prompt, or leave it out."
        )
    return (
        f"prompt {name!r} has {tokens} tokens; with generate.max_new_tokens {max_new_tokens} that is over the model's "
        f"context of {context}. Use at most generate.max_new_tokens={context - tokens}, or shorten the prompt."
    )


def _first(problems: Sequence[str], title: str, recipe: Recipe, most: int = 5) -> str:
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    remedy = ""
    if any(_CANNOT_HOLD.format("") in problem for problem in problems):
        remedy = (
            "\nWrite the character in another way (an accent and its letter as one character, as Unicode's NFC has "
            "them), or set data.unencodable: drop to leave such rows out."
        )
    if any("over model.max_length" in problem for problem in problems):
        remedy += (
            f"\nRaise model.max_length ({recipe.model.max_length}), or set data.overlong: drop to leave long rows out."
        )
    return f"{title}:\n  " + "\n  ".join(problems[:most]) + more + remedy
