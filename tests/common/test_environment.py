"""Environment variables are read and set in one place, and each place that draws has a generator of its own."""

from __future__ import annotations

import ast
import gc
import os
import random

import pytest

from fast_ft.cli import main
from fast_ft.common import environment, seeds, signals
from tests.helpers.parts import ROOT

#: common/environment.py says why these read variables too.
OTHERS = {
    "common/environment.py",
    "common/redaction.py",
    "judge/client.py",
    "judge/address.py",
    "data/jinja_sandbox.py",
}


def test_variables_are_read_and_set_in_one_place() -> None:
    package, found = ROOT / "fast_ft", set()
    for path in package.rglob("*.py"):
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & {"os.environ", "os.getenv", "os.putenv"}:
            found.add(path.relative_to(package).as_posix())
    assert found <= OTHERS


def test_variables_for_a_started_process_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with environment.during({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("1", "1")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(("size", "ended"), [("1", True), ("2", False)])
def test_the_command_line_sets_up_the_signals_of_its_process(
    size: str, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(main, "main", lambda: called.append("main") or 0)
    monkeypatch.setattr(main, "redact_tracebacks", lambda: called.append("redact"))
    monkeypatch.setattr(signals, "end_in_time", lambda: called.append("end"))
    threshold = gc.get_threshold()
    try:
        assert main.own_process() == 0
    finally:
        gc.set_threshold(*threshold)  # which a process of its own raises
    assert called == ["redact", *(["end"] if ended else []), "main"]


def test_generators_draw_what_they_always_drew() -> None:
    assert seeds.generator(3407, 0, 1).random() == random.Random("3407/0/1").random()
    assert seeds.generator(3407).random() == random.Random(3407).random()
    assert seeds.generator(3407, "validation").random() == random.Random("3407/validation").random()
