"""A run's folder: every path in it, its manifest, and the claim that a folder holds one recipe only."""

from __future__ import annotations

import copy
import datetime as dt
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.atomic_files import recover, write_json
from fast_ft.common.errors import InputError
from fast_ft.common.folders import guard
from fast_ft.common.untrusted_files import refuse_links
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.lint import unknown_placeholder
from fast_ft.recipe.schema import Recipe
from fast_ft.run.manifest import Manifest, read_manifest

#: What answering reads of a trained adapter.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "selfcheck.json")


def _nothing() -> None:
    pass


class RunDir:
    """The folder of one run. `open` makes or resumes it; `at` takes one that is there."""

    def __init__(
        self, root: Path, *, on_saved: Callable[[], object] = _nothing, on_answer: Callable[[], object] = _nothing
    ) -> None:
        self.root = root
        self.on_saved = on_saved  # called when a checkpoint or a phase is on the disk
        self.on_answer = on_answer  # called when an answer is, or a judge's reply
        self.manifest_path = root / "manifest.json"
        self.plan = root / "plan.json"
        self.duplicates = root / "duplicates.json"  # which rows were skipped, and of which rows they are duplicates
        self.log = root / "log.jsonl"
        self.diverged = root / "log-diverged.jsonl"  # steps that bad numbers made the run take back
        self.loss_png = root / "loss.png"
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"  # see train/checkpoints.py
        self.taste = root / "taste"  # of a preview (--stop-after): the adapter so far, while it answers
        self.pred = root / "pred.json"
        self.pred_partial = root / "pred.partial.jsonl"
        self.base_pred = root / "base_pred.json"
        self.base_partial = root / "base_pred.partial.jsonl"
        self.scores = root / "scores.json"
        self.answers = root / "answers.json"  # of each answer: new tokens, and whether EOS ended it
        self.report = root / "report.html"
        self.map_png = root / "map.png"

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        recipe_path: str | Path,
        *,
        on_saved: Callable[[], object] = _nothing,
        on_answer: Callable[[], object] = _nothing,
    ) -> RunDir:
        """Return this recipe's run folder, new or to be resumed.

        A new one gets a manifest with the resolved recipe at once. Raises InputError if the folder holds files that are
        no run's, or cannot be written. Whether a run there may go on by this recipe, pipeline/resume.py says.
        """
        from fast_ft.recipe.loader import digest, resolved

        root = output_folder(recipe, recipe_path)
        run = cls(root, on_saved=on_saved, on_answer=on_answer)
        if run.manifest_path.exists():
            refuse_links(root)
            run.manifest()
            recover(root)
            return run
        if root.is_file() or (root.is_dir() and any(not p.name.startswith(".") for p in root.iterdir())):
            raise InputError(f"{root} is there already and is no run's folder: choose another output_dir, or move it")
        manifest = {
            "recipe": resolved(recipe),
            "recipe_file": Path(recipe_path).name,
            "recipe_digest": digest(recipe),
            "started": now(),
            "phases": {},
        }
        write_json(run.manifest_path, manifest)
        return run

    @classmethod
    def at(cls, root: str | Path) -> RunDir:
        """Return the run in folder `root`; InputError where there is none."""
        run = cls(Path(root))
        if not run.root.exists():
            raise InputError(f"{root}: there is no such run folder; `python -m fast_ft runs` lists those in runs/")
        if (run.root / "sweep.json").is_file():
            raise InputError(f"{root} is a sweep's folder: give the run of a trial, such as {run.root / 'best'}")
        if not run.manifest_path.is_file():
            raise InputError(f"{root} is no run folder (it has no manifest.json); `python -m fast_ft runs` lists them")
        refuse_links(run.root)
        run.manifest()
        return run

    def manifest(self) -> dict[str, Any]:
        """Return manifest.json: recipe, recipe_file, recipe_digest, started, phases, and what phases put there."""
        guard(self.manifest_path)
        return read_manifest(self.manifest_path)[0]

    def record(self) -> Manifest:
        """Return manifest.json as a value, to read from."""
        guard(self.manifest_path)
        return read_manifest(self.manifest_path)[1]

    def update(self, **values: Any) -> dict[str, Any]:
        """Put JSON values under these names into the manifest, in place of what is there, and return the manifest."""
        manifest = self.manifest() | values
        write_json(self.manifest_path, manifest)
        return manifest

    def finish(
        self,
        phase: str,
        seconds: float,
        beside: Mapping[str, Any] | None = None,
        spent: Sequence[Path] = (),
        /,
        **facts: Any,
    ) -> None:
        """Note that `phase` is done, when, how long it took in all, and facts about it (JSON values).

        `beside` holds other values of the manifest, written with it. `spent` are files from which the phase would have
        gone on after a stop: they are deleted when the record is on the disk, and not before.
        """
        phases = self.manifest().get("phases", {})
        phases.pop(phase, None)  # so that the last finished is the last listed
        phases[phase] = {"seconds": round(seconds, 3), "finished": now(), **facts}
        self.update(phases=phases, **(beside or {}))
        for path in spent:
            path.unlink(missing_ok=True)
        self.on_saved()

    def reopen(self, *names: str) -> bool:
        """Take these phases' records out of the manifest, and return whether there was one."""
        phases = self.manifest().get("phases", {})
        kept = {name: facts for name, facts in phases.items() if name not in names}
        if kept != phases:
            self.update(phases=kept)
        return kept != phases

    def done(self, phase: str) -> dict[str, Any] | None:
        """Return what `finish` noted for `phase`, or None while it is not done."""
        return self.manifest().get("phases", {}).get(phase)

    def lost(self, phase: str) -> list[Path]:
        """Return the files that a finished `phase` left, that later ones read, and that are not there any more."""
        facts = self.done(phase)
        if facts is None:
            return []
        left = {
            "train": [self.adapter / name for name in ADAPTER_FILES],
            "generate": [self.pred, *([self.base_pred] if facts.get("base_answers") else [])],
            "judge": [self.scores],
        }
        return [path for path in left[phase] if not path.is_file()]

    def others(self, test: str, digest: str) -> RunDir:
        """Return this run with other files for answers and scores: those to the prompts in file `test` of this SHA-256.

        They are called pred-STEM-DIGEST.json, scores-STEM-DIGEST.json and so on.
        """
        name = f"{re.sub(r'[^0-9A-Za-z_]+', '_', Path(test).stem)[:60]}-{digest[:8]}"
        other = copy.copy(self)
        for path in ("pred", "base_pred", "answers", "scores"):
            setattr(other, path, self.root / f"{path}-{name}.json")
        return other

    def recipe(self) -> Recipe:
        """Return the run's own recipe, from its manifest; InputError if it was written by another version."""
        from fast_ft.recipe.loader import validated

        # Values only: a finished run can be read where its base model or its data are gone.
        tree, name = self.manifest().get("recipe", {}), f"{self.manifest_path} (recipe)"
        return policy_ntu_hw5.without_clock(validated(tree, {}, name, consequences=False))


def output_folder(recipe: Recipe, recipe_path: str | Path) -> Path:
    """Return output_dir with {recipe} (the recipe file's stem) and {digest8} filled in.

    {digest8} is the beginning of the recipe's digest (recipe/loader.py), budgets of minutes left aside: with other
    minutes a run goes on.
    """
    from fast_ft.recipe.loader import digest

    if problem := unknown_placeholder(recipe.output_dir):
        raise InputError(f"output_dir: {problem}")
    endless = recipe.budget.model_copy(update={"train_minutes": None, "generate_minutes": None})
    digest8 = digest(recipe.model_copy(update={"budget": endless}))[:8]
    values = {"recipe": Path(recipe_path).stem, "digest8": digest8}
    folder = Path(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], recipe.output_dir))
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise InputError(f"output_dir: {recipe.output_dir}: {error} Write the folder out") from None
    if ".." in folder.parts:  # recipe/lint.py says it of a recipe; a recipe's file can be called "...yaml"
        raise InputError(f"output_dir: {folder} steps out of its folder by ..: write where it leads, without ..")
    return folder


def differences(a: Mapping[str, Any], b: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (value in a, value in b)} where two resolved recipes differ; None where a key is absent."""
    flat_a, flat_b = dict(flattened(a)), dict(flattened(b))
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return {
        key: (flat_a.get(key), flat_b.get(key))
        for key in keys
        if key not in ignore and flat_a.get(key) != flat_b.get(key)
    }


def now() -> str:
    """Return the time in UTC, as 2026-01-31T12:00:00+00:00."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a recipe's sections."""
    # Lists (stages) are compared whole: by position, one inserted stage would make every later key differ.
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flattened(item, f"{prefix}.{key}" if prefix else key)
    elif prefix:
        yield prefix, value
