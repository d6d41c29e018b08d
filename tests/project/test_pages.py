"""Lists in the pages are the program's: a value that is new, or gone, is found here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from fast_ft.cli import chat
from fast_ft.recipe.schema import METRICS, Columns, Model, Recipe, Train
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import State
from tests.helpers.parts import ROOT


def section(page: str, heading: str) -> str:
    """The text of a page below a heading, up to the next heading of its kind."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no heading {heading!r}"
    return found[2]


def first_cells(page: str, heading: str, column: str) -> list[str]:
    """What stands in `...` in the first cells of the table whose first column is called so."""
    rows = section(page, heading).split(f"| {column} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def quoted(page: str, heading: str, after: str, before: str) -> list[str]:
    """The words in `...` in a section, between two pieces of its text."""
    return re.findall(r"`(\w+)`", section(page, heading).split(after)[1].split(before)[0])


def values(model: type[Any], key: str) -> tuple[str, ...]:
    """The values that a key of a recipe may have."""
    return get_args(model.model_fields[key].annotation)


def sections_and_keys() -> list[str]:
    """What the page on recipes names: the sections in its table, and a recipe's own keys below it."""
    named = set(first_cells("recipes.md", "A recipe", "section")) & {*Recipe.model_fields}
    return [*named, *quoted("recipes.md", "A recipe", "keys of its own:", ".\n")]


def chat_commands() -> list[str]:
    return [words.split()[0] for words in first_cells("recipes.md", "Other answers from a finished run", "command")]


#: {what is listed: (what a page says, what the program has)}
LISTS: dict[str, tuple[Callable[[], list[str]], Iterable[str]]] = {
    "sections and keys": (sections_and_keys, Recipe.model_fields),
    "model.backend": (lambda: first_cells("recipes.md", "Kernels", "value"), values(Model, "backend")),
    "model.template": (
        lambda: first_cells("data.md", "Prompt templates", "`model.template`"),
        values(Model, "template"),
    ),
    "data.columns": (lambda: quoted("data.md", "Files", "`columns` knows", "."), Columns.model_fields),
    "train.report_to": (lambda: quoted("recipes.md", "Trackers", "The values are", "."), values(Train, "report_to")),
    "states": (lambda: first_cells("recipes.md", "Many runs", "state"), get_args(State)),
    "chat": (chat_commands, re.findall(r"^/\w+", chat._HELP, re.MULTILINE)),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_the_programs(name: str) -> None:
    said, true = LISTS[name]
    assert sorted(said()) == sorted(true)


def test_every_metric_is_described() -> None:
    """Those of tokens are described with those of words."""
    text = section("data.md", "Choosing rows").split("take these metrics:")[1].split("`reject`")[0]
    assert {name for name in METRICS if f"`{name.replace('_tokens', '_words')}`" not in text} == set()
    assert "the same with `_tokens`" in text


def test_every_file_of_a_run_folder_is_described() -> None:
    described = {name.rstrip("/") for name in first_cells("quickstart.md", "The run folder", "file")}
    paths = [path for path in vars(RunDir(Path("run"))).values() if isinstance(path, Path)]
    unfinished = {path.name for path in paths if ".partial" in path.name} | {"taste", "run"}
    assert {path.name for path in paths} - unfinished <= described
