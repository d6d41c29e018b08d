"""Do a submitted run again: its recipe and its settled plan, never the clock; then say what is equal, and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.common.wording import counted
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.homework import archive, checks
from fast_ft.homework.archive import Bundle
from fast_ft.hub import fingerprint
from fast_ft.models.loaders import choose
from fast_ft.pipeline.run import run
from fast_ft.recipe import key_owners
from fast_ft.recipe.loader import resolved, validated
from fast_ft.recipe.schema import Recipe
from fast_ft.run import provenance
from fast_ft.run.artifacts import read_pred
from fast_ft.run.folder import RunDir

_SHOWN = 300  #: characters of each of two texts that differ
_FOLDER_OF_ROWS = (
    "the validation rows were {!r}. A file that a zip names is never read, so this run cannot be done again"
)
_FOLDER = "the {} was the folder {!r}. A folder that a zip names is never read: give yours with {} FOLDER"


def reproduce(
    path: Path,
    *,
    train: str,
    test: str,
    model: str | None = None,
    tokenizer: str | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Print what differs beforehand, train and answer in a folder of its own, and print and return what came of it.

    `model` and `tokenizer` stand in place of the recipe's. The run folder `output` is runs/reproduced/... by default; a
    second start goes on there. Raises InputError where a rule is broken or the rows are not the same: then nothing is
    trained.
    """
    theirs = archive.read(path)
    untouched = theirs.pred_digest == theirs.manifest.digests.get("pred")
    text = "pred.json is as the run wrote it" if untouched else "pred.json was changed after the run wrote it"
    verdicts = checks.by_manifest(theirs.recipe, theirs.manifest)
    _refuse(path, [*verdicts, checks.Verdict("pred-untouched", untouched, text)])
    root = output or Path("runs") / "reproduced" / f"{path.stem}-{atomic_files.sha256_file(path)[:8]}"
    given = {
        "data.train": train, "data.test": test, "model.name_or_path": model, "model.tokenizer": tokenizer,
        "output_dir": str(root).replace("{", "(").replace("}", ")"),
    }  # fmt: skip
    recipe = replayed(theirs, {key: value for key, value in given.items() if value is not None})
    try:
        choose.refuse_absent(recipe.model.backend)
    except choose.Unavailable as error:
        raise InputError(
            f"{path}: the run was trained through {recipe.model.backend!r} and is repeated through nothing else: "
            f"{error.reason}"
        ) from None
    file = f"{path.stem}.yaml"
    _say("zip", str(path))
    for label, text in beforehand(theirs, recipe):
        _say(label, text)
    prepared = prepare(recipe)
    _refuse(path, [*_same(theirs, recipe, prepared)])
    _say("rows", f"all {len(prepared.examples)} equal, by id and digest, in the same stages")
    folder = RunDir.open(recipe, file)
    if not folder.plan.is_file():
        atomic_files.write_json(folder.plan, theirs.plan.to_json())
        folder.update(plan=theirs.plan.to_json(), reproduction_of=path.name)
    run(recipe, file)
    result = compared(theirs, folder)
    atomic_files.write_json(folder.root / "reproduction.json", result)
    _report(result, folder)
    return result


def replayed(theirs: Bundle, own: Mapping[str, str]) -> Recipe:
    """Return the recipe to run here: theirs, with what was settled in place of `auto`.

    `own` holds values of whoever reproduces, by dotted key. Every other key of the machine's (recipe/key_owners.py) has
    its default: no judge, no tracker, no budget, no backup. InputError where a folder that the zip names would be read.
    """
    trained = theirs.manifest.phase("train")
    tree = key_owners.brought_here(resolved(theirs.recipe), own)
    tree["model"] |= {"backend": trained.backend, "dtype": trained.dtype} | _base(theirs, own)
    if theirs.recipe.data.held_out is not None and theirs.recipe.data.held_out.path is not None:
        raise InputError(_FOLDER_OF_ROWS.format(escaped(theirs.recipe.data.held_out.path)))
    again = theirs.manifest.generated_with  # answered again after training, with other settings
    if again:
        tree["generate"] = {key: value for key, value in again.items() if key != "test"}
    return validated(tree, {}, "the submission's recipe")


def _base(theirs: Bundle, own: Mapping[str, str]) -> dict[str, Any]:
    """Return the recipe's keys of base model and tokenizer: our own, else what the zip names on the hub."""
    there, named = theirs.manifest.model, theirs.recipe.model
    if named.adapter is not None:
        raise InputError(f"the run started from the adapter {escaped(named.adapter)!r}, which no zip holds")
    found: dict[str, Any] = {"revision": (there.commit if there is not None else None) or named.revision}
    if "model.name_or_path" in own:
        found = {"name_or_path": own["model.name_or_path"], "revision": None}
    elif not key_owners.is_hub_id(named.name_or_path) or (there is not None and there.commit is None):
        raise InputError(_FOLDER.format("base model", escaped(named.name_or_path), "--model"))
    if "model.tokenizer" in own:
        found["tokenizer"] = own["model.tokenizer"]
    elif named.tokenizer is not None and not key_owners.is_hub_id(named.tokenizer):
        raise InputError(_FOLDER.format("tokenizer", escaped(named.tokenizer), "--tokenizer"))
    return found


def beforehand(theirs: Bundle, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (label, text) on what there is here and was there: versions, card, program, base model, data files."""
    there, here = theirs.manifest.environment, provenance.describe()
    pairs = {"Python": (there.python, here["python"]), "system": (there.system, here["system"])}
    pairs |= {name: (there.packages.get(name), version) for name, version in here["packages"].items()}
    odd = [f"{name} {a or 'absent'} there, {b or 'absent'} here" for name, (a, b) in pairs.items() if a != b]
    yield "versions", "; ".join(odd) or "the same"
    cards = [(each or {}).get("name", "none") for each in (there.gpu, here["gpu"])]
    yield "card", f"the same ({cards[0]})" if cards[0] == cards[1] else f"{cards[0]} there, {cards[1]} here"
    ours = {path.relative_to(provenance.PACKAGE).as_posix(): path.read_bytes() for path in provenance.source_files()}
    files = sorted(name for name in {*ours, *theirs.program} if ours.get(name) != theirs.program.get(name))
    yield (
        "program",
        f"other in {counted(len(files), 'file')}, such as {files[0]}; this one is run" if files else "the same",
    )
    if recorded := theirs.manifest.model:
        base = fingerprint.model(recipe.model.name_or_path, recipe.model.revision)
        same = base["weights"] == recorded.weights
        yield "base model", "the same" if same else "its weights differ from those that were trained on"
    if (size := theirs.plan.train.world_size) > 1:
        yield "processes", f"{size} trained it, one will train here: equal up to rounding only"
    planned = theirs.plan.decode
    fewer = planned and theirs.manifest.phase("generate").batch_size < min(planned.slots, len(theirs.pred))
    if fewer or theirs.manifest.phase("train").out_of_memory:
        yield "plan", "on its way the run went over to smaller batches than planned; so may this one, elsewhere"


def compared(theirs: Bundle, folder: RunDir) -> dict[str, Any]:
    """Return {adapter, answers, identical, share, first}: the adapter equal or not, the answers by id.

    first is the first answer that differs, in the test file's order: {id, there, here}, or None.
    """
    ours = {id_: entry.answer for id_, entry in read_pred(folder.pred).items()}
    same = [id_ for id_ in ours if ours[id_] == theirs.pred.get(id_)]
    odd = next((id_ for id_ in ours if ours[id_] != theirs.pred.get(id_)), None)
    return {
        "adapter": folder.record().digests["adapter"] == theirs.manifest.digests.get("adapter"),
        "answers": len(ours),
        "identical": len(same),
        "share": round(len(same) / len(ours), 4),
        "first": None if odd is None else {"id": odd, "there": theirs.pred.get(odd, ""), "here": ours[odd]},
    }


def _same(theirs: Bundle, recipe: Recipe, prepared: PreparedData) -> Iterator[checks.Verdict]:
    """Yield whether rows and prompts here are those of the submission. Another layout of the same rows will do."""
    yield checks.rows_verdict(theirs.manifest, prepared)
    yield checks.test_shapes_nothing(recipe, prepared.prompts)
    for name, rule in (("train", "training-file"), ("test", "test-file")):
        if prepared.digests[name] != theirs.manifest.digests.get(name):
            note(f"note: {rule}: {getattr(recipe.data, name)} is not byte for byte the file that was used")
    other = {prompt.id for prompt in prepared.prompts} ^ theirs.pred.keys()
    yield checks.Verdict("test-ids", not other, f"{len(other)} ids are in one of pred.json and the test file only")


def _refuse(path: Path, verdicts: list[checks.Verdict]) -> None:
    if failed := checks.broken(verdicts):
        listed = "".join(f"\n  {each.rule}: {escaped(each.text)}" for each in failed)
        raise InputError(f"{path}: not done again, since this is broken:{listed}")


def _report(result: dict[str, Any], folder: RunDir) -> None:
    _say("adapter", "identical" if result["adapter"] else "differs")
    _say("answers", f"{result['identical']} of {result['answers']} identical ({result['share']:.1%})")
    if first := result["first"]:
        at = next(
            (i for i, (a, b) in enumerate(zip(first["there"], first["here"], strict=False)) if a != b),
            min(len(first["there"]), len(first["here"])),
        )
        start = max(0, at - 60)
        _say("first to differ", f"{first['id']}, from character {at + 1} on")
        for label in ("there", "here"):
            lead, text = "..." if start else "", first[label][start : start + _SHOWN]
            _say(f"  {label}", lead + text + ("..." if len(first[label]) > start + _SHOWN else ""))
    _say("kept in", str(folder.root))


def _say(label: str, text: str) -> None:
    print(f"{label:16} {escaped(text)}", flush=True)
