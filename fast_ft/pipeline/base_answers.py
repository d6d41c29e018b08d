"""The base model's answers to the first prompts, for before and after: with the adapter switched off."""

from __future__ import annotations

from dataclasses import replace

from fast_ft.common.console import note
from fast_ft.common.wording import counted
from fast_ft.data.prepare import PreparedData
from fast_ft.generate import answers
from fast_ft.generate.answers import Generation, Task
from fast_ft.generate.pace import cut_short
from fast_ft.pipeline.adapter_loading import Ready
from fast_ft.recipe.schema import Recipe


def base_answers(
    ready: Ready, recipe: Recipe, prepared: PreparedData, task: Task, tuned: Generation
) -> tuple[Generation | None, list[str]]:
    """Answer the first judge.base_prompts prompts with the adapter switched off.

    Returns the answers, None where there are none, and sentences on those that a budget of minutes took. Where it cut
    the adapter's answers, `tuned`, the base model answers nothing; a prompt whose answer it cuts here is left out.
    """
    prompts, pace = prepared.prompts[: recipe.judge.base_prompts], task.pace
    if not prompts:
        return None, []
    if cut := cut_short(tuned.flat):
        why = f"budget.generate_minutes cut {counted(len(cut), 'answer')} of the tuned model"
        return None, [_said(f"the base model answers nothing: {why}")]
    if pace is not None and pace.left() <= 0:
        return None, [_said("the base model answers nothing: budget.generate_minutes is used up")]
    with ready.loaded.model.disable_adapter():
        made = answers.generate(ready.loaded, prepared.encoder, prompts, recipe.generate, ready.plan, task)
    whole = {key: each for key, each in made.answers.items() if not cut_short(each)}
    if len(whole) == len(prompts):
        return made, []
    said = f"{len(whole)} of {counted(len(prompts), 'prompt')} have an answer of the base model: the others were cut"
    return (replace(made, answers=whole) if whole else None), [_said(f"{said} by budget.generate_minutes")]


def _said(text: str) -> str:
    note(f"note: {text}")
    return text
