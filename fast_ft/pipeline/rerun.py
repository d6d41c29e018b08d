"""What is done again on a finished run: other answers by its adapter, other scores of its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.signals import interruptible
from fast_ft.common.wording import counted
from fast_ft.data import dataset
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.judge import pricing, scoring
from fast_ft.judge.kinds import KINDS
from fast_ft.pipeline import base_check, course_references, former_scores, judge_phase
from fast_ft.pipeline.generate_phase import answer_others, budget_missed, generate_phase
from fast_ft.pipeline.judge_phase import JudgeOptions
from fast_ft.recipe.loader import resolved, with_overrides
from fast_ft.recipe.schema import Recipe
from fast_ft.report import write
from fast_ft.run import lock
from fast_ft.run.folder import RunDir

_MAY_CHANGE = ("generate.", "data.test=", "model.name_or_path=", "model.revision=")


def open_run(root: str | Path, overrides: Sequence[str]) -> tuple[RunDir, Recipe]:
    """Return a trained run's folder and its recipe, with other generate.* values, another data.test or a moved base.

    The base may have another name or lie elsewhere, as long as the adapter's check vouches for it (adapter_check.py).
    """
    folder = RunDir.at(root)
    if folder.done("train") is None:
        raise InputError(f"{root}: this run has no adapter yet. Run its recipe first.")
    if wrong := [text for text in overrides if not text.startswith(_MAY_CHANGE)]:
        raise InputError(
            f"{wrong[0]!r}: only generate.*, data.test and where the base lies (model.name_or_path, model.revision) "
            "can change here; train again for other keys."
        )
    return folder, with_overrides(folder.recipe(), overrides)


def generate_again(root: str | Path, overrides: Sequence[str]) -> Path:
    """Answer prompts again with a run's adapter, and return the file of the answers.

    The run's own prompts are answered into pred.json; a former pred.json of other answers is kept beside, under its
    digest. Answers to other prompts go to a file of their own (RunDir.others).
    """
    folder, recipe = open_run(root, overrides)
    prepared = prepare(recipe)
    if not prepared.prompts:
        raise InputError(f"{root}: there are no prompts to answer. Give them: data.test=FILE.")
    with interruptible(), lock.hold(folder.root):
        if not own_prompts(folder, prepared):
            return _answer_others(folder, recipe, prepared)
        own_partial(folder, recipe, prepared)
        generate_phase(folder, recipe, prepared)
        renew_scores(folder, recipe, prepared)
        write.try_report(folder)
    if (folder.done("generate") or {}).get("cut_by_budget"):
        raise BudgetMissed(budget_missed(folder))
    return folder.pred


def own_prompts(folder: RunDir, prepared: PreparedData) -> bool:
    """Tell whether these prompts are those that the run itself answers, by the digest of their file."""
    return prepared.digests["test"] == folder.manifest()["digests"].get("test")


def _answer_others(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> Path:
    assert recipe.data.test is not None
    others = folder.others(recipe.data.test, prepared.digests["test"])
    own_partial(others, recipe, prepared)
    facts = answer_others(others, recipe, prepared)
    note(
        f"note: these are not the prompts that the run answers: pred.json stays, and the answers are in {others.pred}. "
        f"`judge {folder.root} data.test={recipe.data.test} judge.references=FILE` scores them"
    )
    if cut := facts.get("cut_by_budget"):
        raise BudgetMissed(
            f"budget missed: in {others.pred}, {counted(cut, 'answer')} ended early at {facts['cut_at']} new tokens"
        )
    return others.pred


def own_partial(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
    """Let answering go on only from a stopped answering with the same settings, prompts and adapter."""
    tag = partial_tag(folder, recipe, prepared)
    folder.pred_partial = folder.root / f"pred-{tag}.partial.jsonl"
    folder.base_partial = folder.root / f"base_pred-{tag}.partial.jsonl"


def partial_tag(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> str:
    """Return 8 hex digits of what a run's answers follow from: settings, prompts and adapter, and a base that moved."""
    digests = folder.manifest()["digests"]
    settings = [
        resolved(recipe)["generate"],
        recipe.budget.generate_minutes,
        prepared.digests["test"],
        digests["adapter"],
        *([recipe.model.name_or_path] if base_check.has_moved(folder, recipe) else []),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def renew_scores(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
    """Score new answers where that costs nothing; else set the former answers' scores aside.

    The former scores are kept beside, under the digest of their pred.json.
    """
    if not folder.scores.is_file():
        return
    if former_scores.scored_pred(folder) == folder.manifest()["digests"]["pred"]:
        return
    beside = former_scores.set_scores_aside(folder)
    try:
        if recipe.judge.kind != "none" and KINDS[recipe.judge.kind].is_free:
            judge_phase.judge_phase(folder, recipe, prepared.prompts)
            note(f"the new answers were scored; the former scores are in {beside}")
            return
    except InputError as error:
        note(f"note: {error}")
    note(f"scores.json was of the former answers: it is {beside} now. `judge {folder.root}` scores the new ones")


def judge_again(
    root: str | Path,
    overrides: Sequence[str],
    *,
    against: str | Path | None = None,
    dry_run: bool = False,
    ask_again: bool = False,
) -> RunDir:
    """Judge a run's answers, by its own recipe or by other judge.* keys, and return the run folder.

    With data.test=FILE those are judged that `generate RUN_DIR data.test=FILE` made; their scores have a file of their
    own, which the returned folder names.
    """
    folder = RunDir.at(root)
    if wrong := [text for text in overrides if not text.startswith(("judge.", "data.test="))]:
        raise InputError(
            f"{wrong[0]!r}: only judge.* and data.test can change here; generate or train again for other keys."
        )
    recipe = with_overrides(folder.recipe(), overrides)
    recipe = recipe.model_copy(update={"judge": pricing.bounded(recipe.judge, [o.split("=")[0] for o in overrides])})
    if recipe.judge.kind == "none":
        raise InputError(
            f"{root}: its recipe names no judge. Say which: judge.kind=openai, or judge.kind=reference, and "
            "judge.references=FILE"
        )
    given = any(text.startswith("data.test=") for text in overrides)
    prompts, digest = _prompts(folder, recipe, given)
    other = RunDir.at(against) if against is not None else None
    options = JudgeOptions(against=other, dry_run=dry_run, ask_again=ask_again)
    with interruptible(), lock.hold(folder.root):
        if given and digest != folder.manifest()["digests"].get("test"):
            return _judge_others(folder, recipe, prompts, digest, options)
        judge_phase.judge_phase(folder, recipe, prompts, options)
        if not dry_run:
            write.try_report(folder)
    return folder


def _prompts(folder: RunDir, recipe: Recipe, given: bool) -> tuple[list[Prompt], str]:
    """Return the prompts whose answers are judged, and their file's digest; none where the run's file is gone."""
    test = recipe.data.test if given else folder.manifest().get("generated_with", {}).get("test", recipe.data.test)
    try:
        return dataset.load_prompts(test, recipe.data.columns) if test else ([], "")
    except InputError as error:
        if given:
            raise
        note(f"note: no scores by skill and difficulty, since the prompts cannot be read: {error}")
        return [], ""


def _judge_others(folder: RunDir, recipe: Recipe, prompts: list[Prompt], digest: str, options: JudgeOptions) -> RunDir:
    """Score the answers to other prompts into the file of their scores; the run's own phases are not touched."""
    others = folder.others(recipe.data.test or "", digest)
    if not others.pred.is_file():
        raise InputError(
            f"{folder.root}: these prompts were not answered yet. First: generate {folder.root} "
            f"data.test={recipe.data.test}"
        )
    course_references.check(recipe, judge_phase.answered_prompts(others))
    scores = judge_phase.judge_run(others, recipe.judge, judge_phase.groups(prompts), seed=recipe.seed, options=options)
    if scores is not None and (missed := scoring.too_many_missing(scores)):
        raise BudgetMissed(missed)
    return others
