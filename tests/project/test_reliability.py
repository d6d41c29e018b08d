"""docs/reliability.md: every promise names a test, and every test it names exists."""

from __future__ import annotations

import ast
import functools
import re

from tests.helpers.parts import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def promises() -> list[list[str]]:
    """The cells of every table row: promise, tests, figure."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [row for row in cells if row[0] != "promise" and not set(row[0]) <= set("-: ")]


@functools.cache
def names(path: str) -> set[str]:
    """The test functions of the one file of that name."""
    (file,) = (ROOT / "tests").rglob(path)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_tests_that_exist() -> None:
    assert len(promises()) >= 6
    for row in promises():
        assert len(row) == 3, row
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row[1])
        assert tests, f"{row[0]}: names no test"
        assert re.sub(r"`[\w/]+\.py::\w+`|,|soak|\s|\*", "", row[1]) == "", f"{row[1]}: more than names of tests"
        for path, name in tests:
            assert name in names(path), f"{path} has no {name}"


def test_no_promise_stands_twice() -> None:
    texts = [row[0] for row in promises()]
    assert len(texts) == len(set(texts))
