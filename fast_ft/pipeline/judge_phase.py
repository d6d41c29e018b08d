"""Judge a run: its pred.json in, scores.json out. The pipeline's last phase and `judge RUN_DIR` both come here."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.wording import counted
from fast_ft.data import dataset
from fast_ft.data.examples import Prompt
from fast_ft.data.references import References
from fast_ft.judge import statistics
from fast_ft.judge.kinds import KINDS
from fast_ft.judge.scoring import Group, Item, judge_all, scores_of, summarise, too_many_missing
from fast_ft.pipeline import course_references, former_scores
from fast_ft.recipe import schema
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir


@dataclass(frozen=True)
class JudgeOptions:
    """What a command asks of the judge beside its recipe.

    against: another run, whose answers are scored too and compared. dry_run: only print what would be asked. ask_again:
    kept replies without a score are asked for again. backoff: seconds before the first retry of a request.
    """

    against: RunDir | None = None
    dry_run: bool = False
    ask_again: bool = False
    backoff: float = 1.0


USUAL = JudgeOptions()


def judge_phase(folder: RunDir, recipe: Recipe, prompts: list[Prompt], options: JudgeOptions = USUAL) -> None:
    """Score pred.json, and the base model's answers where there are some, into scores.json.

    Raises BudgetMissed where too many scores are missing; the phase is then not done, and the same command asks again.
    """
    started = time.monotonic()
    course_references.check(recipe, answered_prompts(folder))
    scores = judge_run(folder, recipe.judge, groups(prompts), seed=recipe.seed, options=options)
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
    folder: RunDir, section: schema.Judge, group: Group, *, seed: int, options: JudgeOptions = USUAL
) -> dict[str, Any] | None:
    """Score a run's answers, and the base model's and another run's beside them, into scores.json.

    Returns the file's content, or None of a dry run. Raises InputError and BudgetMissed; replies up to then are kept.
    """
    against = options.against
    sets = _answer_sets(folder, section, against)
    items = [item for each in sets.values() for item in each.values()]
    judge = KINDS[section.kind].make(section, folder.root.parent, [against.root.parent] if against else [])
    if options.dry_run:
        judge.print_forecast(items, ask_again=options.ask_again)
        return None
    with judge.asking(items, ask_again=options.ask_again, backoff=options.backoff):
        judgments = judge_all(judge, items, judge.concurrency, judge.stop, folder.on_answer)
    summaries = {
        name: summarise({key: judgments[item] for key, item in each.items()}, group, seed)
        for name, each in sets.items()
    }
    ours = summaries["run"]
    pred = atomic_files.sha256_file(folder.pred)
    scores = {"kind": section.kind, **judge.facts(), "pred": pred, **ours, **judge.totals(ours["prompts"])}
    if "base" in summaries:
        scores["base"] = summaries["base"]
        scores["gain"] = statistics.compare(scores_of(ours), scores_of(summaries["base"]), seed, "the base model")
    if against is not None:
        theirs = scores_of(summaries["against"])
        scores["against"] = statistics.compare(scores_of(ours), theirs, seed, str(against.root))
    scores["judged_with"] = section.model_dump(mode="json")
    scores["prompts"] = scores.pop("prompts")  # the long part last
    if _of_another_judge(folder.scores, scores):
        note(f"note: the former scores are kept in {former_scores.set_scores_aside(folder)}")
    atomic_files.write_json(folder.scores, scores)
    return scores


def _answer_sets(folder: RunDir, section: schema.Judge, against: RunDir | None) -> dict[str, dict[str, Item]]:
    """Return {"run", and where there are some "base" and "against": {prompt id: what the judge sees}}."""
    references = dataset.load_references(section.references) if section.references else None
    if against is not None and against.root.resolve() == folder.root.resolve():
        raise InputError(f"--against {against.root}: that is the run itself")
    sets = {"run": _items(folder.pred, references)}
    if folder.base_pred.is_file():
        sets["base"] = _items(folder.base_pred, references)
    if against is not None:
        sets["against"] = _same_questions(sets["run"], _items(against.pred, None, sets["run"]), against)
    return sets


def _of_another_judge(path: Path, scores: Mapping[str, Any]) -> bool:
    """Tell whether the scores that are there are of other answers, by another judge, or in another comparison."""
    if not path.is_file():
        return False
    try:
        there = artifacts.read_scores(path).given()
    except InputError:
        return True
    if any(there.get(key) != scores.get(key) for key in ("kind", "pred", "rubric", "judged_with")):
        return True
    return there.get("against") not in (None, scores.get("against"))


def check(section: schema.Judge, prompts: list[Prompt]) -> None:
    """Raise InputError for what would stop the judge after hours of training: no key, a prompt without reference."""
    if section.kind == "none":
        return
    KINDS[section.kind].check()
    if section.references:
        _found(dataset.load_references(section.references), {prompt.id: prompt.messages for prompt in prompts})


def answered_prompts(folder: RunDir) -> list[Prompt]:
    """Return the prompts of pred.json; none where there is no such file yet."""
    entries = artifacts.read_pred(folder.pred) if folder.pred.is_file() else {}
    return [
        Prompt(key, tuple({"role": turn.role, "content": turn.content} for turn in entry.input))
        for key, entry in entries.items()
    ]


def groups(prompts: list[Prompt]) -> Group:
    """Return what the test file tells of its prompts: skill and difficulty."""
    return Group({p.id: p.skill for p in prompts}, {p.id: p.difficulty for p in prompts})


def _items(path: Path, references: References | None, only: Collection[str] | None = None) -> dict[str, Item]:
    """Return {prompt id: what the judge sees} of a pred.json, of the ids `only` where they are given."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no answers yet ({path.name}): run its recipe to the end first")
    texts = {
        key: ([(turn.role, turn.content) for turn in entry.input], entry.answer)
        for key, entry in artifacts.read_pred(path).items()
        if only is None or key in only
    }
    if not texts and only is None:
        raise InputError(f"{path}: holds no answers")
    prompts = {key: [{"role": role, "content": text} for role, text in turns] for key, (turns, _) in texts.items()}
    found = _found(references, prompts) if references is not None else {}
    return {key: Item(_question(turns), found.get(key), answer) for key, (turns, answer) in texts.items()}


def _same_questions(ours: Mapping[str, Item], theirs: dict[str, Item], other: RunDir) -> dict[str, Item]:
    """Return `theirs` with the references of `ours`; InputError where an id of both stands for another question."""
    if other_question := [key for key, item in theirs.items() if item.question != ours[key].question]:
        raise InputError(
            f"--against {other.root}: prompt {other_question[0]!r} is another question there. Runs that are compared "
            "answer the same prompts."
        )
    return {key: item._replace(reference=ours[key].reference) for key, item in theirs.items()}


def _question(turns: list[tuple[str, str]]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _found(references: References, prompts: Mapping[str, Sequence[dict[str, str]]]) -> dict[str, str]:
    """Return {prompt id: reference answer}; InputError where a prompt has none."""
    answers = {key: references.find(key, messages) for key, messages in prompts.items()}
    if missing := [key for key, answer in answers.items() if answer is None]:
        raise InputError(
            f"judge.references: no reference answer for {len(missing)} of {counted(len(prompts), 'prompt')}, such as "
            f"{missing[0]!r}. A reference is a row with the prompt's id or with the prompt's text."
        )
    return {key: answer for key, answer in answers.items() if answer is not None}
