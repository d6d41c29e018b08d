"""A preview of a run: some steps, then ten prompts answered before and after. The run itself goes on from there.

Recipe, folder and schedule are the run's own, so the steps are its first ones and nothing is trained twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import plain
from fast_ft.common.wording import counted
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.generate.answers import Task, generate
from fast_ft.pipeline import way
from fast_ft.pipeline.adapter_loading import load
from fast_ft.pipeline.opening import opened
from fast_ft.pipeline.train_phase import train_phase
from fast_ft.recipe.schema import Recipe
from fast_ft.run.artifacts import read_log
from fast_ft.run.folder import RunDir

PROMPTS = 10
MOST_TOKENS = 256  #: new ones in an answer, so that a preview stays short


def preview(recipe: Recipe, recipe_path: str | Path, stop_after: int) -> dict[str, Any]:
    """Train up to step `stop_after`, answer ten prompts, and return and write taste.json's content.

    {"folder", "steps", "of", "answers": [{"id", "prompt", "before", "after"}]}. A run that is further already is
    previewed where it stands.
    """
    if stop_after < 1:
        raise InputError(f"--stop-after {stop_after}: give at least 1 step")
    way.begin(recipe, recipe_path)
    prepared = prepare(recipe)
    with opened(recipe, recipe_path, prepared) as folder:
        if folder.done("train") is None:
            train_phase(folder, recipe, prepared, stop_after)
        trained = folder.done("train")
        steps = trained["steps"] if trained is not None else len(read_log(folder.log))
        total = sum(len(job.batches) for job in prepared.jobs)
        given = answers(folder, recipe, prepared)
        content = {"folder": str(folder.root), "steps": steps, "of": total, "answers": given}
        atomic_files.write_json(folder.root / "taste.json", content)
        shutil.rmtree(folder.taste, ignore_errors=True)
    return content


def answers(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> list[dict[str, str]]:
    """Answer the first ten prompts with the adapter as it is, and with the base model alone."""
    prompts = prepared.prompts[:PROMPTS]
    if not prompts:
        note("note: the recipe has no data.test, so there is nothing to answer")
        return []
    encoder = prepared.encoder
    adapter = folder.adapter if folder.done("train") else folder.taste / "adapter"
    ready = load(folder, recipe, prepared, adapter)
    section = recipe.generate.model_copy(
        update={"max_new_tokens": min(recipe.generate.max_new_tokens, MOST_TOKENS), "num_return_sequences": 1}
    )

    def ask(title: str) -> dict[str, str]:
        """Return {prompt id: answer} of the model as it is now."""
        partial = folder.taste / "partial.jsonl"
        partial.parent.mkdir(exist_ok=True)
        partial.unlink(missing_ok=True)
        result = generate(ready.loaded, encoder, prompts, section, ready.plan, Task(recipe.seed, partial, title))
        return {id_: given[0].text for id_, given in result.answers.items()}

    after = ask("answers so far")
    with ready.loaded.model.disable_adapter():
        before = ask("answers of the base model")
    ready.loaded.free()
    return [_entry(prompt, before, after) for prompt in prompts]


def _entry(prompt: Prompt, before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {"id": prompt.id, "prompt": prompt.text, "before": before[prompt.id], "after": after[prompt.id]}


def print_preview(content: dict[str, Any]) -> None:
    """Print prompts with both answers, and how to go on."""
    for entry in content["answers"]:
        print(f"\n{plain(entry['prompt'])[:300]}")
        print(f"  before  {plain(entry['before'])[:300]}")
        print(f"  after   {plain(entry['after'])[:300]}")
    done = content["steps"] >= content["of"]
    more = "all are done" if done else "the same command without --stop-after goes on from there"
    print(f"\n{content['steps']} of {counted(content['of'], 'step')} in {content['folder']}; {more}. taste.json "
          "there holds these answers.")  # fmt: skip
