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


PEERS_EMULATED = ("unsloth-notebook", "unsloth-budget")  # as the README's sentence names them


def test_the_readmes_first_table_is_the_measurements() -> None:
    """Its numbers are those of h200-train.md, which is rendered from the raw samples."""
    from bench.table import markdown

    raw = json.loads((figures.RESULTS / "h200-train.json").read_text(encoding="utf-8"))
    whole, emulated = markdown(raw).split("## T4-class emulation, not a T4 (")
    rows = {line.split("|")[1].strip(): line for line in whole.splitlines() if line.startswith("| ")}
    shown = {"fast_ft": "fast_ft", "Unsloth with the homework notebook's settings": "unsloth-notebook",
             "TRL + PEFT + bitsandbytes": "trl-peft"}  # fmt: skip
    readme = README.read_text(encoding="utf-8")
    sentence = readme[readme.index("(T4-class emulation, not a T4) fast_ft is") :].split("\n\n")[0]
    for number, way in zip(re.findall(r"\*\*([\d.]+)\*\*", sentence), PEERS_EMULATED, strict=True):
        row = next(line for line in emulated.splitlines() if line.startswith(f"| {way} "))
        assert f"**{number}** times" in row, way
    assert f"reaches {re.findall(r'[0-9]+%', sentence)[0]} of it" in emulated
    answers = readme[readme.index("It answers 150 prompts") :].split("\n\n")[0]
    entries = json.loads((figures.RESULTS / "figures.json").read_text(encoding="utf-8"))
    for name, form in (
        ("tokens_per_s", "{:,.0f} tokens/s"),
        ("vs_notebook", "{:.0f} times"),
        ("vs_generate", "{} times"),
    ):
        assert form.format(entries[f"decode.h200.{name}"]["value"]) in answers, name
    lines = [line.split("|") for line in readme.splitlines() if line.startswith("| ")]
    cells = {line[1].strip(): line for line in lines if line[1].strip() in shown}
    assert cells.keys() == shown.keys()
    for name, way in shown.items():
        for number in re.findall(r"[\d,]{2,}(?: s)?", " ".join(cells[name][2:])):
            assert f"| {number} " in rows[way] or f"({number} " in rows[way], (name, number)
