"""The runs below a folder, side by side: what each took and came to, and which settings tell it from the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.run import artifacts, lock, time_spent
from fast_ft.run.folder import flattened
from fast_ft.run.made_with import as_made
from fast_ft.run.manifest import Manifest, read_manifest

#: done: all that the recipe asks for is there. answered, trained: scores, or answers too, are missing. failed: training
#: came to nothing. unfinished: training has not ended. running: a living process holds the folder.
State = Literal["done", "answered", "trained", "failed", "unfinished", "running", "unreadable"]

#: Settings that make no run another one: where it is kept, how it is called, what a sweep sets aside.
_NO_DIFFERENCE = ("output_dir", "backup_dir", "run_name", "data.exclude")
T = TypeVar("T")


@dataclass(frozen=True)
class ListedRun:
    """One run. `settings` are {dotted key: value}, those of its answers and scores as these were made."""

    folder: Path
    manifest: Manifest
    state: State
    minutes: float  #: of all phases
    train_minutes: float  #: of all training steps
    scores: artifacts.Scores | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The recipe's run_name, or ""."""
        return str(self.manifest.recipe.get("run_name") or "")

    @property
    def recipe(self) -> str:
        """The name of the recipe's file, without its ending."""
        return Path(self.manifest.recipe_file).stem or "unknown recipe"

    @property
    def score(self) -> float | None:
        """The mean of scores.json."""
        return self.scores.mean if self.scores is not None else None


def list_runs(root: str | Path = "runs") -> list[ListedRun]:
    """Return the runs in `root`, oldest first.

    A damaged file hides no run: it is said in a warning, and a run without a readable manifest has a state of its own.
    A manifest.json without a recipe is another program's.
    """
    top = Path(root)
    # ** walks through no links; a run folder itself may be one
    paths = sorted({*top.glob("**/manifest.json"), *top.glob("*/manifest.json")})
    runs = [run for path in paths if (run := _listed(path.parent)) is not None]
    return sorted(runs, key=lambda run: run.manifest.started)


def differing(runs: Sequence[ListedRun]) -> list[dict[str, Any]]:
    """Return for each run {dotted key: value} of the settings that are not the same in all `runs`."""
    names = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(_NO_DIFFERENCE))
    keys = [key for key in names if len({_text(run, key) for run in runs}) > 1]
    return [{key: run.settings.get(key) for key in keys} for run in runs]


def unusual(runs: Sequence[ListedRun]) -> list[dict[str, Any]]:
    """Return of `differing` what tells each run from most others: values that no majority shares, the rarest first."""
    found = differing(runs)
    counts = {key: Counter(_text(run, key) for run in runs) for key in (found[0] if found else ())}
    chosen = []
    for run, values in zip(runs, found, strict=True):
        shared = {key: counts[key][_text(run, key)] for key in values}
        rare = [key for key in sorted(values, key=shared.__getitem__) if 2 * shared[key] <= len(runs)]
        chosen.append({key: values[key] for key in rare})
    return chosen


def _listed(folder: Path) -> ListedRun | None:
    """Return the run in a folder that has a manifest.json, or None where that is another program's."""
    try:
        content, manifest = read_manifest(folder / "manifest.json")
    except InputError:
        return ListedRun(folder, Manifest(), "unreadable", 0.0, 0.0)
    if not manifest.recipe:
        return None
    lines = _tried(artifacts.read_log, folder / "log.jsonl") or []
    return ListedRun(
        folder,
        manifest,
        "running" if lock.is_held(folder) else ended_as(manifest),
        time_spent.run_minutes(manifest, lines),
        time_spent.step_minutes(lines),
        _tried(artifacts.read_scores, folder / "scores.json"),
        dict(flattened(as_made(content))),
    )


def ended_as(manifest: Manifest) -> State:
    """Return the state of a run that nobody is at."""
    train = manifest.phase("train")
    if train.worthless or train.why == "numbers":
        return "failed"
    if "train" not in manifest.phases:
        return "unfinished"
    missing = [phase for phase in _asked_for(manifest.recipe) if phase not in manifest.phases]
    return "done" if not missing else "answered" if missing == ["judge"] else "trained"


def _asked_for(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield the phases after training that the recipe asks for."""
    if recipe.get("data", {}).get("test") is not None:
        yield "generate"
        if recipe.get("judge", {}).get("kind", "none") != "none":
            yield "judge"


def _text(run: ListedRun, key: str) -> str:
    return json.dumps(run.settings.get(key))


def _tried(read: Callable[[Path], T], path: Path) -> T | None:
    """Return what `read` reads; None where there is no file, and with a warning where it is damaged."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except InputError as error:
        note(f"warning: {error}")
        return None
