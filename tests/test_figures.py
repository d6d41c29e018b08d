"""Every figure in figures.json follows from the raw result that it points at, and the README shows just those."""

from __future__ import annotations

import json
import re

import pytest

from bench import figures, pocket
from bench.__main__ import headline

README = figures.RESULTS.parents[1] / "README.md"


def test_the_readme_table_is_rendered_from_figures_json() -> None:
    assert figures.render_readme(README) == README.read_text(encoding="utf-8"), "run python -m bench --readme"


@pytest.mark.parametrize("name", sorted(name for name in figures.read() if name.startswith("recipe.")))
def test_a_recipe_figure_is_recomputed_from_its_steps(name: str) -> None:
    entry = figures.read()[name]
    result = json.loads((figures.RESULTS / entry["source"]).read_text(encoding="utf-8"))
    value, unit = headline(result)[name.rsplit(".", 1)[1]]
    assert (entry["value"], entry["unit"]) == (value, unit)
    assert entry["card"] == result["environment"]["gpu"]["name"]
    assert entry["command"] == result["command"]


def test_the_pocket_figures_are_recomputed_from_their_runs() -> None:
    found = {name: entry for name, entry in figures.read().items() if name.startswith("pocket.")}
    result = json.loads((figures.RESULTS / "pocket.json").read_text(encoding="utf-8"))
    expected = pocket.headline(result)
    assert {name: (entry["value"], entry["unit"]) for name, entry in found.items()} == expected
    assert {each["steps"] for runs in result["variants"].values() for each in runs} == {pocket.STEPS}


def test_every_figure_names_card_command_source_and_date() -> None:
    for name, entry in figures.read().items():
        assert sorted(entry) == ["card", "command", "date", "source", "unit", "value"], name
        assert (figures.RESULTS / entry["source"]).is_file(), name
        assert entry["command"].startswith("python -m "), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]), name
