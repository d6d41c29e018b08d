"""Nothing that a row, an answer, a file or a judge says draws on the terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli import chat
from fast_ft.cli.main import main
from fast_ft.common import console, text_safety
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe

#: What terminals obey: colours, titles, clearing, links, answers to queries, the clipboard, 8-bit forms, direction.
ANSI = [
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b[31;5mred", "\x1b]8;;http://198.51.100.1/\x07link\x1b]8;;\x07", "\x1b[6n",
    "\x1b]52;c;ZWNobyBoaQ==\x07", "\x9b31m", "\x9d0;title\x9c", "\x1bP+q544e\x1b\\", "over\rwritten", "back\b\b\b\b",
    "\x1b[?1049h", "bell\x07", "\x0e shifted \x0f", "\u202egnp.exe", "\u2066a\u2069", "\u061c\u200e\u200f",
    "\u2028x\u2029", "\x7f", "\x00", "half \ud83d of a character",
]  # fmt: skip
EVIL = " ".join(ANSI)


def acts(text: str) -> set[str]:
    """The characters of a text that a terminal would obey."""
    shown = text.replace("\n", "").replace("\t", "")
    return {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in text_safety._DIRECTION}


@pytest.mark.parametrize("text", ANSI, ids=range(len(ANSI)))
def test_what_a_terminal_obeys_is_shown_instead(text: str) -> None:
    assert acts(text)
    for made in (text_safety.harmless(text), text_safety.plain(text), text_safety.escaped(text)):
        assert not acts(made)
        made.encode()


def test_what_people_write_stays() -> None:
    for text in ("a\tb\n", "naïve café", "日本語", "👩‍👩‍👧 ❤️", "می‌خواهم", "x² ≤ 3 – “so”"):
        assert text_safety.harmless(text) == text


def test_notes_errors_and_bars_carry_no_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(EVIL)
    with console.Bar(EVIL, 1) as bar:
        bar.advance(facts=EVIL)
    assert main(["genrate\x1b[31m", "x"]) == 2
    assert main(["runs/\x1b[2J.yaml"]) == 2
    captured = capsys.readouterr()
    assert not acts(captured.err + captured.out) and "\\u001b[31;5m" in captured.err


def test_rows_shown_selected_and_listed_carry_no_codes(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(i: int, text: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"Say {text} {i}?"}, {"from": "gpt", "value": f"{text} is said. {i}"}]
        return {"id": f"{text} {i}", "conversations": turns, "score": 4.0}

    texts = [text for text in ANSI if "\ud83d" not in text]  # Arrow holds whole characters only
    rows = [row(i, text) for i, text in enumerate(texts)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "prompts.json").write_text(json.dumps(rows[:3]))
    changes = {"data.train": f"{tmp_path}/rows.json", "data.test": f"{tmp_path}/prompts.json", "model.max_length": 256}
    path = str(recipe_file(changes | {"select": {}}))
    count = str(len(rows))
    assert main(["data", path, "--show", count]) == 0
    table = capsys.readouterr()
    assert (not acts(table.out + table.err) and "equals" in table.out + table.err) or "exact" in table.out
    assert main(["data", path, "--json"]) == 0
    listed = capsys.readouterr()
    assert not acts(listed.out + listed.err)
    assert sorted(each["id"] for each in json.loads(listed.out)["selected"]) == sorted(r["id"] for r in rows)


def test_runs_and_chat_carry_no_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one\x1b[31m", "two"):
        (tmp_path / name).mkdir()
        manifest = {"recipe": {"seed": name}, "started": EVIL, "phases": {EVIL: {"seconds": 1.0}}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    assert main(["runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "two" in captured.out and not acts(captured.out + captured.err)
    assert RunDir.at(tmp_path / "two").root.name == "two"

    class Encoder:
        end_ids = (len(EVIL),)

        def decode(self, tokens: Any) -> str:
            return EVIL[: tokens[0]]

    class Row:
        tokens = [len(EVIL)]  # noqa: RUF012

    class Engine:
        def run(self, rows: Any, burst: int, on_look: Any) -> Any:
            row = rows[0]
            for seen in range(0, len(EVIL), 7):
                row.tokens = [seen]
                on_look(rows)
            row.tokens = [len(EVIL)]
            return iter(())

    out = io.StringIO()
    stub: Any = chat._answer
    assert stub(Engine(), Row(), Encoder(), out) == EVIL
    assert not acts(out.getvalue()) and out.getvalue().count("\\u001b") == EVIL.count("\x1b")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path, test_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    path = write_recipe(folder, tiny, train_file, test_file, {"curriculum.stages": []})
    assert main(["train", str(path), f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_line_with_half_a_character_is_asked_for_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Backspace takes one byte of three in a terminal that does not know of UTF-8."""
    said = "你好\n".encode() + "好".encode()[:2] + b"\nWhy?\n\xff\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    asked: list[str] = []

    def answer(pool: Any, row: Any, encoder: Any, out: Any) -> str:
        asked.append(encoder.decode(row.prompt))
        return "So."

    monkeypatch.setattr(chat, "_answer", answer)
    assert main(["chat", str(trained)]) == 0
    assert capsys.readouterr().err.count("holds a part of a character") == 2
    assert ["Why?" in text for text in asked] == [False, True]


def test_chat_with_stdin_closed_says_so_before_it_loads_anything(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "load", None)
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["chat", str(trained)]) == 2
        assert "stdin, which is closed" in capsys.readouterr().err
