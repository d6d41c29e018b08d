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


FILES = [path for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py")) if programs(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_program_in_a_string_imports_is_there(path: Path) -> None:
    for program in programs(path):
        for module, name in imports(program):
            if name is None or not hasattr(importlib.import_module(module), name):
                importlib.import_module(module if name is None else f"{module}.{name}")


def test_programs_are_found() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"tests/gpu/test_backends.py", "tests/gpu/test_phases.py", "bench/recipe_run.py"} <= found
