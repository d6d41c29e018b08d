"""What several runs are called side by side: by the names that a person gave, else by the settings that differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast_ft.report.run_data import Run
from fast_ft.run.folder import flattened

MOST_SETTINGS = 3  #: in a name
MOST_LETTERS = 24  #: of a setting's value
#: Settings that make no run another one.
_NO_DIFFERENCE = ("output_dir", "backup_dir", "run_name", "data.exclude")
#: How output_dir's default ends a folder's name: with the recipe's digest. Nobody typed such a name.
_DIGEST = re.compile(r"-[0-9a-f]{8}$")


def named(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names that differ.

    A run's name is its recipe's run_name; else its folder's, where a person chose it; else the recipe's file with the
    settings that differ among the runs. Where two given names are the same, these settings follow, and then numbers.
    """
    settings = [dict(flattened(run.recipe)) for run in runs]
    keys = _differing(settings)
    told = [_told(keys, own) for own in settings]
    names = [given(run) or ", ".join([_stem(run), *more]) for run, more in zip(runs, told, strict=True)]
    names = [
        ", ".join([name, *more]) if names.count(name) > 1 and given(run) else name
        for run, name, more in zip(runs, names, told, strict=True)
    ]
    names = [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def given(run: Run) -> str:
    """Return the name that a person gave the run: run_name, or the folder's; "" where there is none."""
    name = run.recipe.get("run_name")
    if isinstance(name, str) and name:
        return name
    return "" if _DIGEST.search(run.name) else run.name


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for each in settings for key in each if not key.startswith(_NO_DIFFERENCE))
    return [key for key in keys if len({_text(each.get(key)) for each in settings}) > 1]


def _stem(run: Run) -> str:
    return Path(run.manifest.recipe_file).stem or _DIGEST.sub("", run.name)


def _told(keys: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Return a run's own values of the first few keys, such as "learning_rate 0.0003"."""
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}
    more = [f"{len(keys) - MOST_SETTINGS} more"] if len(keys) > MOST_SETTINGS else []
    return [*(f"{short[key]} {_text(settings.get(key))}" for key in keys[:MOST_SETTINGS]), *more]


def _text(value: Any) -> str:
    """Return a setting as a name has room for it: a path's last part, and few letters."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
