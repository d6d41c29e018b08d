"""Judge a run: its pred.json in, scores.json out. The pipeline's last phase and `judge RUN_DIR` both come here."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.data import dataset
from fast_ft.judge import client, reference_judge, statistics
from fast_ft.judge.openai_judge import NOTES, OpenAIJudge
from fast_ft.judge.reply_cache import FILE, Verdicts
from fast_ft.judge.scoring import Group, Item, Judgment, judge_all, scores_of, summarise, too_many_missing
from fast_ft.pipeline import resume
from fast_ft.recipe import schema
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir


def judge_phase(folder: RunDir, recipe: Recipe, prompts: list[dataset.Prompt], **options: Any) -> None:
    """Score pred.json, and the base model's answers where there are some, into scores.json; options: judge_run's.

    Raises BudgetMissed where too many scores are missing; the phase is then not done, and the same command asks again.
    """
    started = time.monotonic()
    scores = judge_run(folder, recipe.judge, groups(prompts), seed=recipe.seed, **options)
    if scores is None:  # a dry run
        return
    if missed := too_many_missing(scores):
        raise BudgetMissed(missed)
    facts = {key: scores[key] for key in ("model", "rubric") if key in scores}
    folder.finish(
        "judge",
        time.monotonic() - started,
        {"judged_with": resolved(recipe)["judge"]},
        kind=recipe.judge.kind,
        mean=scores["mean"],
        **facts,
    )


def judge_run(
    folder: RunDir,
    section: schema.Judge,
    group: Group,
    *,
    seed: int,
    against: RunDir | None = None,
    dry_run: bool = False,
    ask_again: bool = False,
    backoff: float = 1.0,
) -> dict[str, Any] | None:
    """Score a run's answers, and the base model's and another run's beside them, into scores.json; return its content.

    With dry_run only print what would be asked, and return None. ask_again: replies that hold no score are asked for
    again. Raises InputError and BudgetMissed; replies up to then are kept. `backoff`: seconds before a first retry.
    """
    references = dataset.load_references(section.references) if section.references else None
    if against is not None and against.root.resolve() == folder.root.resolve():
        raise InputError(f"--against {against.root}: that is the run itself")
    sets = {"run": _items(folder.pred, references)}
    if folder.base_pred.is_file():
        sets["base"] = _items(folder.base_pred, references)
    if against is not None:
        sets["against"] = _same_questions(sets["run"], _items(against.pred, references, sets["run"]), against)
    items = [item for each in sets.values() for item in each.values()]
    facts: dict[str, Any]
    if section.kind == "openai":
        judged = _ask(folder, section, items, against, dry_run, ask_again, backoff)
        if judged is None:
            return None
        judgments, facts = judged
    else:
        assert section.kind == "reference", section.kind
        if dry_run:
            print(f"{len(items)} answers to compare with their references; no network, no cost")
            return None
        judgments, facts = judge_all(reference_judge.ReferenceJudge(), items), {"notes": reference_judge.NOTES}
    summaries = {
        name: summarise({key: judgments[item] for key, item in each.items()}, group, seed)
        for name, each in sets.items()
    }
    scores = {"kind": section.kind, **facts, "pred": atomic_files.sha256_file(folder.pred), **summaries["run"]}
    if section.kind == "openai":
        scores |= _extras(summaries["run"]["prompts"])
    if "base" in summaries:
        scores["base"] = summaries["base"]
        scores["gain"] = statistics.compare(scores_of(scores), scores_of(summaries["base"]), seed, "the base model")
    if against is not None:
        scores["against"] = statistics.compare(
            scores_of(scores), scores_of(summaries["against"]), seed, str(against.root)
        )
    scores["judged_with"] = section.model_dump(mode="json")
    scores["prompts"] = scores.pop("prompts")  # the long part last
    if _of_another_judge(folder.scores, scores):
        note(f"note: the former scores are kept in {resume.set_scores_aside(folder)}")
    atomic_files.write_json(folder.scores, scores)
    return scores


def _of_another_judge(path: Path, scores: Mapping[str, Any]) -> bool:
    """Tell whether the scores that are there are of other answers, by another judge, or in another comparison."""
    if not path.is_file():
        return False
    try:
        there = artifacts.read_scores(path)
    except InputError:
        return True
    if any(there.get(key) != scores.get(key) for key in ("kind", "pred", "rubric", "judged_with")):
        return True
    return there.get("against") not in (None, scores.get("against"))


def check(section: schema.Judge, prompts: list[dataset.Prompt]) -> None:
    """Raise InputError for what would stop the judge after hours of training: no key, a prompt without reference."""
    if section.kind == "openai":
        client.require_key()
    if section.kind != "none" and section.references:
        _refuse_missing([prompt.id for prompt in prompts], dataset.load_references(section.references))


def groups(prompts: list[dataset.Prompt]) -> Group:
    """Return what the test file tells of its prompts: skill and difficulty."""
    return Group({p.id: p.skill for p in prompts}, {p.id: p.difficulty for p in prompts})


def _ask(
    folder: RunDir,
    section: schema.Judge,
    items: list[Item],
    against: RunDir | None,
    dry_run: bool,
    ask_again: bool,
    backoff: float,
) -> tuple[dict[Item, Judgment], dict[str, Any]] | None:
    others = [against.root.parent / FILE] if against else []
    verdicts = Verdicts(folder.root.parent / FILE, others)
    judge = OpenAIJudge(section, verdicts, pairwise=section.references is not None)
    if dry_run:
        if ask_again:
            judge.forget_unreadable(items)
        estimate = judge.estimate(items)
        print(f"{section.model} at {judge.url}, rubric {judge.rubric} ({judge.facts()['labelled']}): {estimate}")
        judge.check_caps(estimate)
        return None
    with verdicts.locked():
        if ask_again:
            judge.forget_unreadable(items)
        estimate = judge.estimate(items)
        note(f"judge: {section.model} at {judge.url}, {judge.facts()['labelled']}: {estimate}")
        judge.check_caps(estimate)
        if estimate.requests:
            judge.open(backoff)
        judgments = judge_all(judge, items, section.concurrency, judge.stop, folder.on_answer)
    return judgments, judge.facts() | {"notes": NOTES[judge.rubric]}


def _extras(prompts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean score of the reference answers, and what the order of the two answers did."""
    given = [each["reference_score"] for each in prompts.values() if each["reference_score"] is not None]
    both = [
        (each["swapped"]["score"], each["first_score"])
        for each in prompts.values()
        if "swapped" in each and None not in (each["swapped"]["score"], each["first_score"])
    ]
    effect = round(fmean(ahead - behind for ahead, behind in both), 4) if both else None
    return {
        "reference_mean": statistics.mean(given),
        "swapped": {"order_effect": effect} if effect is not None else None,
    }


def _items(path: Path, references: Mapping[str, str] | None, only: Collection[str] | None = None) -> dict[str, Item]:
    """Return {prompt id: what the judge sees} of a pred.json, of the ids `only` where they are given."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no answers yet ({path.name}): run its recipe to the end first")
    texts = {
        key: ([(turn["role"], turn["content"]) for turn in entry["input"]], entry["output"][0])
        for key, entry in artifacts.read_pred(path).items()
        if only is None or key in only
    }
    if not texts and only is None:
        raise InputError(f"{path}: holds no answers")
    if references is not None:
        _refuse_missing(list(texts), references)
    return {
        key: Item(_question(turns), references[key] if references is not None else None, answer)
        for key, (turns, answer) in texts.items()
    }


def _same_questions(ours: Mapping[str, Item], theirs: dict[str, Item], other: RunDir) -> dict[str, Item]:
    """Return `theirs`; InputError where an id of both stands for another question."""
    if other_question := [key for key, item in theirs.items() if item.question != ours[key].question]:
        raise InputError(
            f"--against {other.root}: prompt {other_question[0]!r} is another question there. Runs that are compared "
            "answer the same prompts."
        )
    return theirs


def _question(turns: list[tuple[str, str]]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _refuse_missing(ids: list[str], references: Mapping[str, str]) -> None:
    missing = [key for key in ids if key not in references]
    if missing:
        raise InputError(
            f"judge.references: no reference answer for {len(missing)} of {len(ids)} prompts, such as "
            f"{missing[0]!r}. References are matched by id."
        )
