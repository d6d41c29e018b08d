"""The report of the newest versions ends in time, with all that it started, and says what it does not know."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tools import newest


def test_a_command_that_takes_too_long_ends_with_what_it_started(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    for seconds in (1, 4, 16, 64):  # on a busy machine the shell may not even begin within the first
        with pytest.raises(newest.Late):
            newest.run(["sh", "-c", f"sleep 600 & echo $! > {inner}; wait"], time.monotonic() + seconds)
        if inner.is_file() and inner.read_text():
            break
    assert not psutil.pid_exists(pid := int(inner.read_text())) or psutil.Process(pid).status() == "zombie"
    assert newest.run(["sh", "-c", "echo said; exit 3"], time.monotonic() + 600).returncode == 3


def test_what_is_not_known_in_time_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(newest, "SECONDS", 0.0)
    newest.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.endswith(": not known; the report has 0 s") for line in said)
