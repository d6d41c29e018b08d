"""Answers of a run's adapter to prompts of the moment: into a file elsewhere or onto the screen, the run as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.folders import expanded
from fast_ft.common.outputs import check_output
from fast_ft.common.signals import interruptible
from fast_ft.common.wording import counted
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import prepare, with_prompts
from fast_ft.pipeline.generate_phase import answer_only
from fast_ft.pipeline.rerun import open_run, own_partial
from fast_ft.recipe.schema import Recipe
from fast_ft.run import lock
from fast_ft.run.folder import RunDir


def answer_apart(
    root: str | Path, overrides: Sequence[str], file: str | None, text: str | None, output: Path | None
) -> dict[str, Any]:
    """Answer the prompts of `file`, or the one prompt `text`, and return what pred.json would hold of them.

    `output` gets the same as a file. Neither pred.json nor the manifest changes, and the base model answers nothing.
    Raises InputError, and BudgetMissed where answers were cut short by a budget of minutes.
    """
    if wrong := [word for word in overrides if word.startswith("data.test=")]:
        raise InputError(f"{wrong[0]}: --prompt and --prompts name the prompts already. Give one of them only.")
    folder, recipe = open_run(root, overrides)
    if output is not None:
        _refuse_output(output, folder, file, recipe)
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"test": file}),
            "judge": recipe.judge.model_copy(update={"base_prompts": 0}),
        }
    )
    prepared = prepare(recipe)
    if text is not None:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        prepared = with_prompts(prepared, recipe, [_prompt(text)], digest, "--prompt")
    with interruptible(), lock.hold(folder.root):
        own_partial(folder, recipe, prepared)
        answers, facts = answer_only(folder, recipe, prepared)
        if output is not None:
            atomic_files.write_json(output, answers)
        folder.pred_partial.unlink(missing_ok=True)
    if cut := facts.get("cut_by_budget"):
        raise BudgetMissed(f"budget missed: {counted(cut, 'answer')} ended early at {facts['cut_at']} new tokens")
    return answers


def _prompt(text: str) -> Prompt:
    if not text.strip():
        raise InputError("--prompt: the text is empty")
    return Prompt("prompt", ({"role": "user", "content": text.strip()},))


def _are_answers(content: bytes) -> bool:
    """Return whether a file holds answers in the form of pred.json."""
    try:
        answers = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(answers, dict) and all(
        isinstance(entry, dict) and {"input", "output"} <= entry.keys() for entry in answers.values()
    )


def _refuse_output(output: Path, folder: RunDir, file: str | None, recipe: Recipe) -> None:
    """Raise InputError where the answers would be written over something that is not theirs, or cannot be a file."""
    there = output.resolve()
    if there.is_relative_to(folder.root.resolve()):
        raise InputError(f"--output {output}: the run's folder holds the run's own files. Name a file elsewhere.")
    check_output(output, _are_answers, "answers.json")
    data, held_out = recipe.data, recipe.data.held_out
    read = [file, *(source.path for source in data.sources), data.test, recipe.judge.references]
    for name in filter(None, [*read, held_out.path if held_out else None]):
        if there == expanded(name).resolve():
            raise InputError(f"--output {output}: that file is read, and is not written over. Name another file.")
