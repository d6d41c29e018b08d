"""What is printed and drawn: tables, rows with their masks, the bar, the loss picture."""

from __future__ import annotations

import io
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli import tables
from fast_ft.common.console import Bar, note
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.recipe.loader import load_recipe
from fast_ft.report.plots import loss_picture, smoothed
from tests.helpers.parts import POCKET, RecipeFactory


def lines(losses: list[float], stages: str = "aaabbb") -> list[dict[str, Any]]:
    return [
        {"stage": stage, "step": step, "loss": loss, "learning_rate": 0.1 / step, "skipped": False}
        for step, (loss, stage) in enumerate(zip(losses, stages, strict=True), 1)
    ]


def size(path: Path) -> tuple[int, int]:
    """A PNG's width and height, from its header."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("losses", "stages"),
    [
        ([3.0, 2.5, 2.0, 1.9, 1.5, 1.4], "aaabbb"),
        ([3.0], "a"),
        ([3.0, math.nan, math.inf, 2.0], "aabb"),
        ([math.nan, math.nan], "aa"),
    ],
)
def test_a_loss_picture_is_drawn_of_any_losses(losses: list[float], stages: str, tmp_path: Path) -> None:
    loss_picture(tmp_path / "loss.png", lines(losses, stages))
    assert size(tmp_path / "loss.png") == (1080, 624)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.pictures
def test_the_same_losses_give_the_same_picture_and_others_another(tmp_path: Path) -> None:
    for name, last in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        loss_picture(tmp_path / name, lines([3.0, last], "aa"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_mean_leaves_out_what_is_no_number() -> None:
    assert smoothed([4.0, 2.0, math.nan, 3.0], 2, [1, 1, 1, 1]) == [4.0, 3.0, 2.0, 3.0]
    assert smoothed([4.0, 1.0], 2, [2, 1]) == [4.0, 3.0], "a step counts by its trained tokens"
    assert math.isnan(smoothed([math.inf], 10, [1])[0])


@pytest.fixture
def prepared(recipe_file: RecipeFactory) -> PreparedData:
    return prepare(load_recipe(recipe_file()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_change_where_training_begins(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "200"), ("NO_COLOR", ""), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    row_id = prepared.examples[0].id
    tables.print_row(prepared, row_id)
    text = out.getvalue()
    grey, green = "\x1b[38;5;244m", "\x1b[32m"
    assert grey in text and green in text
    assert text.rindex(grey) < text.index(green), "masked tokens first, then trained ones"
    assert text.index("<BOS>") < text.rindex(grey) and text.index(green) < text.rindex("<EOS>")
    assert "4m" in text, "neighbours are told apart by an underline"


def test_a_rows_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from fast_ft.data.examples import Example

    encoder = Encoder(POCKET)
    evil = Example.exchange("evil", "clear \x1b[2J\x1b]0;title\x07 the screen\r", "ok \x9b31m")
    stub: Any = PreparedData.__new__(PreparedData)
    for name, value in (("encoder", encoder), ("rows", {"evil": encoder.row(evil)})):
        object.__setattr__(stub, name, value)
    tables.print_row(stub, "evil")
    out = capsys.readouterr().out
    assert "clear" in out and not set("\x1b\x07\r\x9b") & set(out)


def test_summaries_leave_out_what_was_not_measured() -> None:
    assert tables._summary([3, None, 1, True]) == {"least": 1.0, "median": 1.0, "most": 3.0}
    assert tables._summary([None]) is None


def test_a_bar_without_a_terminal_prints_its_end_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("rows", 3, done=1) as bar:
        bar.advance(1, "early")
        bar.advance(1, "7 tokens/s")
    note("a note")
    captured = capsys.readouterr()
    assert captured.out == ""
    last, noted = captured.err.splitlines()
    assert last.startswith("rows  3/3  7 tokens/s") and noted == "a note"


def test_a_bar_in_a_terminal_shows_count_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(RuntimeError), Bar("rows", 2) as bar:
        bar.advance(1, "loss 1.5")
        raise RuntimeError("the bar is stopped all the same")
    assert "1/2" in err.getvalue() and "loss 1.5" in err.getvalue()
