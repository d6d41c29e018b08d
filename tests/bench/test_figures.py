"""Every figure in figures.json follows from the raw result that it points at."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import evidence, figures, machine, pocket
from bench.__main__ import figures_of
from fast_ft.common.errors import InputError

SOURCES = sorted({entry["source"] for entry in figures.read().values()})


def result_of(entry: dict[str, Any]) -> dict[str, Any]:
    return json.loads((figures.RESULTS / entry["source"]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(figures.read()))
def test_a_figure_is_recomputed_from_its_raw_samples(name: str) -> None:
    """Its value, and its card, command, date and commit too: whatever the raw result does not say fails here."""
    entry = figures.read()[name]
    result = result_of(entry)
    value = figures_of(result)[name]
    assert figures.entries({name: value}, result, entry["source"]) == {name: entry}


@pytest.mark.parametrize("source", SOURCES)
def test_no_figure_of_another_card_is_called_an_h200s(source: str) -> None:
    """The same samples under another card's name: names of figures follow it, whatever the file is called."""
    text = (figures.RESULTS / source).read_text(encoding="utf-8")
    on_h200, on_h100 = (
        figures_of(json.loads(each)) for each in (text, text.replace("NVIDIA H200", "NVIDIA H100 PCIe"))
    )
    renamed = {name.replace("h200", "h100") for name in on_h200 if not name.endswith(".floor_share")}
    assert {name for name in on_h100 if not name.endswith(".floor_share")} == renamed
    assert not any("h200" in name for name in on_h100)


def test_every_figure_of_the_pocket_is_there() -> None:
    found = {name for name in figures.read() if name.startswith("pocket.")}
    result = json.loads((figures.RESULTS / "pocket.json").read_text(encoding="utf-8"))
    assert found == set(pocket.headline(result))
    assert {each["steps"] for runs in result["variants"].values() for each in runs} == {pocket.STEPS}


def test_every_figure_says_where_when_and_by_what_it_was_measured() -> None:
    shown = figures.table()
    for name, entry in figures.read().items():
        assert (figures.RESULTS / entry["source"]).is_file(), name
        assert entry["command"].startswith("python -m "), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]), name
        line = next(line for line in shown.splitlines() if f"| `{name}` |" in line)
        date = entry["date"] + (f" ({entry['date_is']})" if "date_is" in entry else "")
        assert f" | {date} | " in line, name
        assert ("| not recorded |" in line) == (entry["commit"] is None), "a missing commit is said"
        assert ("lacks" in entry) == bool(evidence.lacks(result_of(entry))), name
        assert f" | {', '.join(entry.get('lacks', ()))} | " in line, "what is lacking is said"
        card = "cpu" if entry["card"].startswith("CPU") else machine.card_slug(entry["card"])
        carried = re.split(r"[._-]", name)
        # how far a plan, the model of a T4, or one way from another is off says nothing of a card's speed
        of_no_card = carried[0] in ("plan", "t4") or {"real", "t4class"} & {*carried} or name.endswith(".host_gib")
        assert card in carried or of_no_card or (card == "cpu" and "pocket" in name + entry["source"]), name


def test_a_comparison_with_others_lacks_nothing() -> None:
    """A figure that compares with another library's best rests on a commit and two runs; single settings make none."""
    for name, entry in figures.read().items():
        if "_best_peer" in name and not name.startswith("run."):  # a command's first time comes once
            assert "lacks" not in entry, name
        assert not name.endswith((".vs_notebook", ".vs_budget", ".vs_trl_peft")), name


@pytest.mark.parametrize(
    ("result", "lacking"),
    [
        ({"kind": "smollm", "commit": "0123456789abcdef"}, []),
        ({"kind": "smollm", "commit": None}, ["a commit"]),
        ({"kind": "smollm", "commit": "0123456789abcdef+changes"}, ["a commit"]),
        ({"kind": "smollm", "commit": "0123456; None"}, ["a commit"]),
        ({"kind": "run", "commit": "0123456"}, ["a second run"]),
        ({"backend": "peft"}, ["a commit", "a second run"]),
        ({"kind": "whole", "commit": "0123456", "runs": [{"way": "a", "turn": t} for t in ("cold", "warm") * 2]}, []),
        (
            {"kind": "whole", "commit": "0123456", "runs": [{"way": way, "turn": "warm"} for way in ("a", "b", "a")]},
            ["a second run"],
        ),
        ({"kind": "decode", "commit": "0123456", "measurements": [{"name": "fixed", "tokens": 1}] * 2}, []),
        ({"kind": "decode", "commit": "0123456", "measurements": [{"name": "fixed", "tokens": 1}]}, ["a second run"]),
        ({"kind": "peers", "commit": "0123456", "setups": {"whole": {"finals": [{"way": "a"}, {"way": "b"}] * 2}}}, []),
        (
            {"kind": "peers", "commit": "0123456", "setups": {"x": {"finals": [{"way": "a"}] * 2 + [{"way": "b"}]}}},
            ["a second run"],
        ),
        (
            {
                "kind": "train", "commit": "0123456",
                "setups": {"whole": {"fast_ft": {"program": "a"}}, "t4class": {"fast_ft": {"program": "b"}}},
            },
            ["one program", "a second run"],
        ),
        ({"kind": "published-t4"}, []),
    ],
)  # fmt: skip
def test_what_a_measurement_lacks(result: dict[str, Any], lacking: list[str]) -> None:
    assert evidence.lacks(result) == lacking


def test_a_result_says_when_where_and_by_which_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "0123456789abcdef")
    result = machine.stamp("python -m bench")
    entry = figures.entries({"a": (1.0, "s")}, result | {"date": "2026-01-31T12:00:00+00:00"}, "a.json")["a"]
    assert (entry["date"], entry["commit"], entry["command"]) == ("2026-01-31", "0123456789abcdef", "python -m bench")
    assert entry["card"] == (result["environment"]["gpu"] or {"name": f"CPU, {result['cores']} cores"})["name"]
    assert "| 0123456 |" in figures.table({"a": entry}, [])
    with pytest.raises(InputError, match=r"a\.json does not say when it was measured"):
        figures.entries({"a": (1.0, "s")}, {key: value for key, value in result.items() if key != "date"}, "a.json")
    several = entry | {"commit": "None; 0123456789abcdef+changes"}
    assert "| not recorded, 0123456+changes |" in figures.table({"a": several}, [])


def test_the_commit_is_the_repositorys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None
    git("init", "-q")
    (tmp_path / "fast_ft").mkdir()
    (tmp_path / "fast_ft" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "m")
    assert machine.commit() == git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("is no part of the program")
    assert machine.commit() == git("rev-parse", "HEAD")
    (tmp_path / "fast_ft" / "a.py").write_text("2")
    assert machine.commit() == git("rev-parse", "HEAD") + "+changes"
