"""What differs between a run and what is asked of it now: recipe, rows, prompts, base; by what follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted, listed
from fast_ft.data.examples import Example
from fast_ft.data.prepare import PreparedData
from fast_ft.pipeline import base_check
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir, differences
from fast_ft.run.made_with import as_made

Diff = dict[str, tuple[Any, Any]]  #: {dotted key: (was, is)}

_FREE = ("run_name", "budget.", "search", "train.save_steps", "train.report_to")
_ANSWERS = ("generate.", "data.test", "judge.base_prompts")
_JUDGED = ("judge.",)


@dataclass(frozen=True)
class Changes:
    """What differs from what the run began with, by what follows from it."""

    training: Diff = field(default_factory=dict)
    answers: Diff = field(default_factory=dict)
    judging: Diff = field(default_factory=dict)
    free: Diff = field(default_factory=dict)

    def any(self) -> bool:
        """Return whether anything differs."""
        return bool(self.training or self.answers or self.judging or self.free)


def compare(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> Changes:
    """Return what differs between a run and what is asked for now: recipe, selected rows, prompts.

    Answers and scores are compared by what they were made with. Scores of a recipe that asks for none are left alone.
    """
    changes, manifest = Changes(), folder.manifest()
    try:
        former = resolved(folder.recipe())  # with the defaults of keys that came later
    except InputError:
        former = manifest["recipe"]
    judge = former["judge"]
    former = as_made(manifest | {"recipe": former})
    if judge["kind"] == recipe.judge.kind == "none":
        former["judge"] = judge
    for key, pair in differences(former, resolved(recipe), ignore=("output_dir", "backup_dir")).items():
        kinds = ((_FREE, changes.free), (_ANSWERS, changes.answers), (_JUDGED, changes.judging))
        into = next((diff for names, diff in kinds if key.startswith(names)), changes.training)
        into[key] = pair
    rows = recorded(prepared.examples)
    if manifest["rows"] != rows or manifest["stages"] != prepared.staged():
        changes.training["the selected rows"] = _rows_differ(manifest["rows"], rows)
    was, is_ = manifest["digests"].get("test"), prepared.digests.get("test")
    if was != is_ and "data.test" not in changes.answers:
        changes.answers[f"{recipe.data.test}'s digest"] = (was, is_)
    held_out = recorded(prepared.held_out)
    if manifest.get("validation", []) != held_out:
        changes.training["the validation rows"] = _rows_differ(manifest.get("validation", []), held_out)
    record = folder.record()
    changes.training.update(base_check.token_changes(record, prepared))
    if not changes.answers and not changes.training:
        changes.answers.update(base_check.prompt_changes(record, prepared))
    return changes


def show(diff: Diff) -> str:
    """Return a diff as indented lines: key: was -> is."""
    return "\n".join(f"  {key}: {_show(was)} -> {_show(is_)}" for key, (was, is_) in diff.items())


def recorded(rows: Iterable[Example]) -> list[dict[str, str]]:
    """Return what the manifest says of rows."""
    return [{"id": row.id, "digest": row.digest} for row in rows]


def _rows_differ(was: list[dict[str, str]], is_: list[dict[str, str]]) -> tuple[str, str]:
    old, new = ({row["id"]: row["digest"] for row in rows} for rows in (was, is_))
    changes = {
        "new": [id_ for id_ in new if id_ not in old],
        "gone": [id_ for id_ in old if id_ not in new],
        "changed": [id_ for id_ in new if id_ in old and old[id_] != new[id_]],
    }
    told = [f"{len(ids):,} {what} ({listed(list(map(repr, ids)))})" for what, ids in changes.items() if ids]
    what = ", ".join(told) or "in another order or other stages"
    return counted(len(was), "row"), f"{counted(len(is_), 'row')}: {what}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."
