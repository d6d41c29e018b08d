"""Every figure in figures.json follows from the raw result that it points at, and the README shows just those."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench import figures, pocket
from bench.__main__ import figures_of

README = figures.RESULTS.parents[1] / "README.md"


def result_of(entry: dict[str, Any]) -> dict[str, Any]:
    return json.loads((figures.RESULTS / entry["source"]).read_text(encoding="utf-8"))


def test_the_readme_table_is_rendered_from_figures_json() -> None:
    assert figures.render_readme(README) == README.read_text(encoding="utf-8"), "run python -m bench --readme"


@pytest.mark.parametrize("name", sorted(figures.read()))
def test_a_figure_is_recomputed_from_its_raw_samples(name: str) -> None:
    """There is no figure without a rule: what figures_of does not compute is not in it, and fails here."""
    entry = figures.read()[name]
    result = result_of(entry)
    assert figures_of(result, entry["source"].removesuffix(".json"))[name] == (entry["value"], entry["unit"])
    assert entry["command"] == result["command"]
    gpu = result["environment"]["gpu"]
    assert entry["card"] == gpu["name"] if gpu else entry["card"].startswith("CPU")


def test_every_figure_of_the_pocket_is_there() -> None:
    found = {name for name in figures.read() if name.startswith("pocket.")}
    result = json.loads((figures.RESULTS / "pocket.json").read_text(encoding="utf-8"))
    assert found == set(pocket.headline(result))
    assert {each["steps"] for runs in result["variants"].values() for each in runs} == {pocket.STEPS}


def test_every_figure_names_card_command_source_and_date() -> None:
    for name, entry in figures.read().items():
        assert sorted(entry) == ["card", "command", "date", "source", "unit", "value"], name
        assert (figures.RESULTS / entry["source"]).is_file(), name
        assert entry["command"].startswith("python -m "), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]), name
