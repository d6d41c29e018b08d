"""How often Python looks for reference cycles: seldom from a command's start on, as usual once libraries are there."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fast_ft.common import environment, garbage


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before, enabled = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.set_threshold(*garbage.USUAL)
    gc.collect()
    yield
    gc.set_threshold(*before)
    if not enabled:
        gc.disable()
    gc.unfreeze()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def looks(objects: int) -> int:
    """Return how many times Python looks at the youngest objects while that many cycles are made."""
    seen: list[str] = []

    def count(phase: str, _: object) -> None:
        seen.append(phase)

    gc.callbacks.append(count)
    try:
        kept = [Cycle() for _ in range(objects)]
    finally:
        gc.callbacks.remove(count)
    assert kept
    return seen.count("start")


def test_cycles_are_looked_for_seldom_and_then_as_usual_among_new_objects() -> None:
    usual = looks(20_000)
    assert usual >= 3
    garbage.seldom()
    assert looks(20_000) == 0
    with garbage.new_objects_only():
        assert gc.get_freeze_count() > 0 and looks(20_000) >= 3


def test_a_command_of_its_own_looks_seldom() -> None:
    code = (
        "import gc, sys; from fast_ft.cli import main; "
        "main.main = lambda: print(gc.get_threshold()[0]) or 0; sys.exit(main.own_process())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 100_000


def test_what_a_program_leaves_is_not_looked_through_but_its_temporary_folders_go(tmp_path: Path) -> None:
    code = (
        "import atexit, gc, sys, tempfile; "
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000)); "  # called last
        "from fast_ft.cli import main; "
        "main.main = lambda: globals().update(kept=tempfile.TemporaryDirectory(dir=sys.argv[1])) or 0; "
        "sys.exit(main.own_process())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"] and not done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_is_off_within_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with environment.without_compiler():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with environment.without_compiler():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
