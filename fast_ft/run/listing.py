"""The runs below a folder, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.untrusted_files import json_object
from fast_ft.run.folder import flattened
from fast_ft.run.made_with import as_made
from fast_ft.run.manifest import read_manifest


def list_runs(root: str | Path = "runs") -> list[dict[str, Any]]:
    """Return one row for each run in `root`, oldest first.

    A row has folder (str), started (ISO time), phase (the last one finished, or None), minutes (all finished
    phases), score (scores.json's, or None) and keys ({dotted key: value} for the keys that differ among the runs).
    An unreadable manifest gives a row whose phase says so: one bad run must not hide the others.
    """
    rows, recipes = [], []
    top = Path(root)
    for path in sorted({*top.glob("**/manifest.json"), *top.glob("*/manifest.json")}):  # ** walks through no links
        try:
            manifest, _ = read_manifest(path)
        except InputError:
            manifest = {"phases": {"unreadable manifest": {}}}
        phases = manifest.get("phases", {})
        seconds = sum(phase.get("seconds", 0.0) for phase in phases.values())
        rows.append(
            {
                "folder": str(path.parent),
                "started": manifest.get("started", ""),
                "phase": next(reversed(phases), None),
                "minutes": round(seconds / 60, 2),
                "score": _score(path.parent / "scores.json"),
            }
        )
        recipes.append(dict(flattened(as_made(manifest))))
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("output_dir", "data.exclude"))
    differing = [key for key in keys if len({json.dumps(recipe.get(key)) for recipe in recipes}) > 1]
    for row, recipe in zip(rows, recipes, strict=True):
        row["keys"] = {key: recipe.get(key) for key in differing}
    return sorted(rows, key=lambda row: str(row["started"]))


def _score(path: Path) -> float | None:
    try:
        content = json_object(path)
    except (InputError, OSError):
        return None
    value = content.get("mean", content.get("score"))
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # JSON's whole numbers have no end
        return None
