"""Whatever stdout can show, however wide it is, and whenever its reader leaves: no traceback, nothing lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_ft.cli.main import COMMANDS, main
from fast_ft.common import streams
from fast_ft.common.console import note
from tests.helpers.parts import ROOT, RecipeFactory


@pytest.fixture
def wide_rows(recipe_file: RecipeFactory, tmp_path: Path) -> str:
    """A recipe over rows with text that few encodings have."""
    turns = [("Say é in 日本語 👍?", "É 是 日本語 👍. ≤"), ("And ≥?", "“So” it is.")]
    rows = [
        {
            "id": f"é日👍{i}",
            "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": said}],
            "score": 4,
        }
        for i, (ask, said) in enumerate(turns)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(recipe_file({"data.train": f"{tmp_path}/rows.json", "data.test": None, "select": {}, "curriculum": {}}))


def printed(words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints on a stdout of this encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(words) == 0
    assert isinstance(out.buffer, io.BytesIO)
    return out.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp950"])
def test_text_that_stdout_cannot_show_is_escaped(
    encoding: str, wide_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = printed(["data", wide_rows, "--show", "2"], encoding, monkeypatch)
    assert "\\ud83d\\udc4d" in shown and "row " in shown
    assert ("é" in shown) == (encoding == "cp1252") and ("日本" in shown) == (encoding == "cp950")
    content = printed(["data", wide_rows, "--json"], encoding, monkeypatch)
    assert json.loads(content) == json.loads(printed(["data", wide_rows, "--json"], "utf-8", monkeypatch))


def test_a_shells_encoding_reaches_both_streams(tmp_path: Path) -> None:
    script = (
        "import sys; from fast_ft.common import console, streams; streams.set_up(); text = sys.argv[1]\n"
        "print(text); console.note(text); streams.new_console().print(text); streams.finish()"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, "é 日 👍"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    escaped = "\\u00e9 \\u65e5 \\ud83d\\udc4d"
    assert (done.stdout.split("\n"), done.stderr.strip()) == ([escaped, escaped, ""], escaped)


@pytest.mark.parametrize("columns", ["0", "-3", "1", "²", "x", "9" * 9])
def test_a_width_that_is_none_counts_as_unknown(
    columns: str, wide_rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert main(["data", wide_rows]) == 0
    assert "2 of 2 rows" in capsys.readouterr().out and not {"COLUMNS", "LINES"} & os.environ.keys()


def broken_pipe() -> io.TextIOWrapper:
    """A stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")  # noqa: PTH123


@pytest.mark.parametrize("words", [["--show", "2"], ["--json"]])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_left_ends_a_command_quietly(
    name: str, words: list[str], wide_rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = broken_pipe()
    with monkeypatch.context() as patch, stream:
        patch.setattr(sys, name, stream)
        if name == "stderr":
            patch.setitem(COMMANDS, "data", lambda options: note("a line"))
        assert main(["data", wide_rows, *words]) == streams.READER_LEFT
        print("what Python flushes at its end goes nowhere", file=stream, flush=True)
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(options: object) -> int:
        raise BrokenPipeError

    monkeypatch.setitem(COMMANDS, "runs", wrong)
    with pytest.raises(BrokenPipeError):
        main(["runs"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_stdout_is_a_message(
    wide_rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        patch.setattr(sys, "stdout", full)
        assert main(["data", wide_rows, "--json"]) == 2
    assert "no space left on device" in capsys.readouterr().err


def test_closed_streams_are_as_good_as_dev_null(wide_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert main(["data", wide_rows]) == 0
        assert main(["data", "nowhere.yaml"]) == 2
        sys.stdout.close()
        sys.stderr.close()


def test_the_status_of_a_process_whose_reader_left() -> None:
    with broken_pipe() as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "fast_ft", "schema"], cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")
