"""tests/helpers/killed.py: a forked process is as one that was started, whatever test forked before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.killed import start_function


def tell(path: str) -> None:
    """In the child."""
    Path(path).write_text(os.environ.get("MARKED", "not set"))


def test_a_forked_process_has_the_environment_of_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    start_function(tell, str(tmp_path / "first")).join()
    assert dict(os.environ) == before
    monkeypatch.setenv("MARKED", "here")
    start_function(tell, str(tmp_path / "second")).join()
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == ["not set", "here"]
