"""Programs that tests and the bench hand to `python -c`: what they import is there. No tool reads code in strings."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.helpers.parts import ROOT

OURS = ("fast_ft", "bench", "tests")


def programs(path: Path) -> list[ast.Module]:
    """Return the strings of a file that are programs and import our modules."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            if not any(name in node.value for name in OURS):
                continue
            try:
                program = ast.parse(node.value)
            except (SyntaxError, ValueError):
                continue
            if imports(program):
                found.append(program)
    return found


def imports(program: ast.Module) -> list[tuple[str, str | None]]:
    """Return (module, name in it or None) of all that a program imports of ours."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in OURS]


@pytest.fixture(scope="module")
def found() -> dict[str, list[ast.Module]]:
    """{file: its programs} of all files that have some."""
    paths = [path for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): own for path in paths if (own := programs(path))}


def test_what_a_program_in_a_string_imports_is_there(found: dict[str, list[ast.Module]]) -> None:
    for path, own in found.items():
        for module, name in (each for program in own for each in imports(program)):
            try:
                if name is None or not hasattr(importlib.import_module(module), name):
                    importlib.import_module(module if name is None else f"{module}.{name}")
            except ImportError as error:
                raise AssertionError(f"{path}: a program in a string imports what is not there") from error


def test_programs_are_found(found: dict[str, list[ast.Module]]) -> None:
    assert {"tests/gpu/test_backends.py", "tests/gpu/test_phases.py", "bench/recipe_run.py"} <= found.keys()
