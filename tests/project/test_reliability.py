"""docs/reliability.md: every promise names a test, every test it names exists, and its figures are the program's."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from fast_ft.common import untrusted_files
from fast_ft.data import jinja_sandbox, tokenizer
from fast_ft.doctor import versions
from fast_ft.homework import archive
from fast_ft.recipe import yaml_source
from fast_ft.recipe.schema import Judge
from tests.common.test_text_safety import ANSI
from tests.data.test_jinja_sandbox import CODE
from tests.doctor.test_kernels import CHECKS
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


#: What the column of figures says of the program's limits and of what its tests go through.
FIGURES = [
    f"{len(versions.PAIRS)} pairs",
    f"{len(ANSI)} sequences",
    f"{len(CODE)} known ways out",
    f"{len(CHECKS) - 1} kernels",  # the last of these checks is Unsloth's import
    f"{jinja_sandbox.SECONDS:g} s, {jinja_sandbox.MEMORY >> 30} GiB, {jinja_sandbox.MOST_CHARACTERS:,} characters",
    f"{archive.MOST_BYTES >> 20} MiB, {archive.MOST_MEMBERS:,} members",
    f"{untrusted_files.MOST_JSON >> 20} MiB, tokenizers {tokenizer.MOST_TOKENIZER >> 20} MiB",
    f"{yaml_source.MAX_NODES:,} values, {yaml_source.MAX_DEPTH} levels",
    f"{Judge().max_requests:,} requests, {Judge().max_dollars:g} dollar",
]


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_the_programs(figure: str) -> None:
    assert any(re.match(rf"{re.escape(figure)}(?!\w)", row[2]) for row in promises()), (
        f"docs/reliability.md: write {figure}"
    )
