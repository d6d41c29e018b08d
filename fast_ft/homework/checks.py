"""Does a finished run keep the homework's rules? Each rule by its name, with what is wrong.

Every rule is checked for every run, but for `model`, which needs `rules: ntu-ml-2025-hw5` in the recipe: the
quickstart's base is no LLaMA2-7B, and it can still be packed, to try how handing in works. The manifest is taken at
its word where nothing else is left to compare it with; an edit of both files is found by `reproduce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data import contamination, dataset, mixing
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import SelectedData, select_data
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.loader import content_digest
from fast_ft.recipe.schema import Recipe
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir
from fast_ft.run.manifest import Leakage, Manifest


@dataclass(frozen=True)
class Verdict:
    """One rule: `passed`, or not, or None where it does not apply; `text` says what was found."""

    rule: str
    passed: bool | None
    text: str


def check(folder: RunDir) -> list[Verdict]:
    """Check a run folder against every rule. Reads the data files again; raises InputError for what is no run."""
    manifest = folder.record()
    unfinished = [phase for phase in ("train", "generate") if folder.done(phase) is None]
    if unfinished:
        raise InputError(f"{folder.root}: not finished ({', '.join(unfinished)} to do). Run its recipe to the end.")
    recipe = folder.recipe()
    if recipe.data.test is None:
        raise InputError(f"{folder.root}: its recipe has no data.test, so there is nothing to hand in")
    return [
        *by_manifest(recipe, manifest),
        *_data(recipe, manifest, folder.pred),
        _untouched("adapter-untouched", folder.adapter / "adapter_model.safetensors", manifest, "adapter"),
        _untouched("pred-untouched", folder.pred, manifest, "pred"),
    ]


def by_manifest(recipe: Recipe, manifest: Manifest) -> list[Verdict]:
    """Check the rules that the manifest alone can break; `recipe` is the manifest's."""
    staged = {id_ for stage in manifest.stages for id_ in stage.ids}
    distinct = len({row.id for row in manifest.rows} | staged)
    few = distinct <= policy_ntu_hw5.MAX_ROWS
    return [
        _recipe(manifest),
        _seed(recipe),
        _model(recipe, manifest),
        _bits(recipe, manifest),
        Verdict("at-most-100-rows", few, f"{distinct} distinct training rows over all stages"),
        _trackers(recipe),
        _clock(manifest),
        *_validation(distinct, manifest),
    ]


def _validation(trained: int, manifest: Manifest) -> Iterator[Verdict]:
    if manifest.validation:
        text = f"{trained} rows were trained on; {len(manifest.validation)} more were validation rows, which gave no "
        yield Verdict("validation-rows", None, text + "gradient: the rules do not speak of such rows, so ask the TAs")


def broken(verdicts: list[Verdict]) -> list[Verdict]:
    """Return the rules that are not kept."""
    return [verdict for verdict in verdicts if verdict.passed is False]


def _recipe(manifest: Manifest) -> Verdict:
    same = content_digest(manifest.recipe) == manifest.recipe_digest
    text = "the manifest's recipe is the one that the run began with"
    return Verdict("recipe-untouched", same, text if same else "the manifest's recipe was changed after the run began")


def _seed(recipe: Recipe) -> Verdict:
    return Verdict(
        "seed", recipe.seed == policy_ntu_hw5.SEED, f"{recipe.seed}; the homework fixes it at {policy_ntu_hw5.SEED}"
    )


def _model(recipe: Recipe, manifest: Manifest) -> Verdict:
    name = recipe.model.name_or_path
    if recipe.rules is None:
        return Verdict("model", None, f"not applied, since the recipe has no `rules`: {name} need not be LLaMA2-7B")
    recorded = manifest.model
    if recorded is None:
        return Verdict("model", False, "the manifest does not say what the base model was (an older version's run)")
    problems = [text for text in policy_ntu_hw5.check_recipe(recipe) if text.startswith("model.name_or_path")]
    problems += policy_ntu_hw5.check_model_config(recorded.config.given())
    if (recorded.name_or_path, recorded.revision) != (name, recipe.model.revision):
        problems.append(f"the manifest records {recorded.name_or_path!r}, the recipe names {name!r}")
    where = f"at commit {recorded.commit}" if recorded.commit else "from a folder"
    return Verdict("model", not problems, "; ".join(problems) or f"{name} {where}")


def _bits(recipe: Recipe, manifest: Manifest) -> Verdict:
    quantised = (manifest.model.config.quantization_config if manifest.model is not None else None) or {}
    if quantised and not quantised.get("load_in_4bit"):
        return Verdict("4-bits", False, "the base model is quantised in another way; the homework's has 4 bits")
    text = "model.load_in_4bit is " + ("true" if recipe.model.load_in_4bit else "false; the homework's model has 4")
    return Verdict("4-bits", recipe.model.load_in_4bit, text)


def _data(recipe: Recipe, manifest: Manifest, pred: Path) -> Iterator[Verdict]:
    """The rules on rows and prompts, from the files as they are now."""
    recorded = manifest.digests
    assert recipe.data.test is not None
    prompts: list[Prompt] | None = None
    try:
        prompts, digest = dataset.load_prompts(recipe.data.test, recipe.data.columns)
        yield _file("test-file", recipe.data.test, digest, recorded.get("test"))
        yield test_shapes_nothing(recipe, prompts)
    except InputError as error:
        yield Verdict("test-file", False, str(error))
    try:
        pool_digest = mixing.load_pool(recipe.data).digest
        yield _file("training-file", recipe.data.train_name, pool_digest, recorded.get("train"))
        prepared = select_data(recipe)
    except InputError as error:
        yield Verdict("rows", False, f"the rows cannot be selected again: {error}")
    else:
        yield rows_verdict(manifest, prepared)
        yield _leakage(manifest.leakage, prepared.leakage)
    if prompts is not None:
        yield _answers(pred, prompts)


def test_shapes_nothing(recipe: Recipe, prompts: list[Prompt]) -> Verdict:
    """Check that the recipe leaves no training row out because of a test prompt."""
    rule, named = "test-shapes-nothing", contamination.excluded_prompts(recipe.data.exclude, prompts)
    if not named:
        return Verdict(rule, True, "data.exclude holds no digest of a test prompt")
    text = f"data.exclude holds the digests of {len(named)} test prompts, the first is {named[0]!r}; the test set may "
    return Verdict(rule, False, text + "not change the training rows: take them out of data.exclude and train again")


def _file(rule: str, path: str, now: str, then: str | None) -> Verdict:
    same = now == then
    text = f"{path} is as it was" if same else f"{path} is not the file that the run was made with: its digest differs"
    return Verdict(rule, same, text)


def rows_verdict(manifest: Manifest, prepared: SelectedData) -> Verdict:
    """Check that the manifest's rows and stages are those that were selected now, in the same order."""
    recorded = [(row.id, row.digest) for row in manifest.rows]
    selected = [(example.id, example.digest) for example in prepared.examples]
    if recorded == selected and manifest.staged() == prepared.staged():
        return Verdict("rows", True, f"as the recipe selects them, unchanged: {counted(len(recorded), 'row')}")
    ours, theirs = dict(recorded), dict(selected)
    odd = [id_ for id_ in {**ours, **theirs} if ours.get(id_) != theirs.get(id_)]
    what = f"{len(odd)} differ, the first is {odd[0]!r}" if odd else "their order or stages differ"
    return Verdict("rows", False, f"the manifest's rows are not those that the recipe selects from the file: {what}")


def _leakage(recorded: Leakage, again: dict[str, Any]) -> Verdict:
    if recorded.examples is None:
        return Verdict("leakage-certificate", False, "the manifest holds no leakage certificate")
    if recorded.model_dump() != {key: again[key] for key in ("examples", "prompts", "hits")}:
        return Verdict("leakage-certificate", False, "the manifest's certificate is not what the check finds now")
    hits = len(recorded.hits)
    compared = f"{counted(recorded.examples or 0, 'row')} compared with {counted(recorded.prompts or 0, 'prompt')}"
    text = f"{compared}: {hits} in common, all reported"
    return Verdict("leakage-certificate", True, text)


def _answers(path: Path, prompts: list[Prompt]) -> Verdict:
    try:
        pred = artifacts.read_pred(path)
    except (OSError, InputError) as error:
        return Verdict("test-ids", False, f"cannot be read as answers: {error}")
    given = {id_: ([turn.given() for turn in entry.input], len(entry.output)) for id_, entry in pred.items()}
    wanted = {prompt.id: (list(prompt.messages), 1) for prompt in prompts}
    missing, extra = [id_ for id_ in wanted if id_ not in given], [id_ for id_ in given if id_ not in wanted]
    other = [id_ for id_ in wanted if id_ in given and given[id_] != wanted[id_]]
    found = {"missing": missing, "not in the test file": extra, "with another prompt, or not one answer": other}
    wrong = [f"{len(ids)} {what}, such as {ids[0]!r}" for what, ids in found.items() if ids]
    text = "; ".join(wrong) or f"exactly the test file's {len(wanted)} ids, one answer each"
    return Verdict("test-ids", not wrong, text)


def _untouched(rule: str, path: Path, manifest: Manifest, name: str) -> Verdict:
    recorded = manifest.digests.get(name)
    if not path.is_file():
        return Verdict(rule, False, f"{path} is not there")
    same = atomic_files.sha256_file(path) == recorded
    text = f"{path.name} is as the run wrote it" if same else f"{path.name} was changed after the run wrote it"
    return Verdict(rule, same, text)


def _trackers(recipe: Recipe) -> Verdict:
    tracker = recipe.train.report_to
    return Verdict("no-trackers", tracker == "none", f"train.report_to is {tracker}")


def _clock(manifest: Manifest) -> Verdict:
    """What a clock cut short depends on the speed of the machine, so nobody can make it again."""
    if said := manifest.cut_short():
        text = f"a budget of minutes cut the run short: {'; '.join(said)}. Run it with more minutes, or with null"
        return Verdict("no-clock", False, text)
    return Verdict("no-clock", True, "no budget of minutes cut training or an answer short")
