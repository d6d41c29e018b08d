"""Before and after the installation: what a Python without the packages is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_ft import __main__ as start
from tests.helpers.parts import ROOT


def without_packages(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a Python that sees no site-packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-S", "-m", "fast_ft", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["doctor"], ["recipes/quickstart.yaml"], ["data", "recipes/strong.yaml"], ["runs"]])
def test_without_packages_every_command_says_what_to_install(words: list[str]) -> None:
    found = without_packages(*words)
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ") and "lacks packages that fast_ft needs: packaging, pyarrow, pydantic" in line
    assert "bin/activate" in line and "fast_ft doctor" not in line


def test_the_help_needs_no_packages() -> None:
    found = without_packages("--help")
    assert found.returncode == 0 and "doctor" in found.stdout


def test_the_remedy_is_the_activation_where_make_has_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "ROOT", tmp_path)
    assert start.what_to_install() is None, "this Python has the packages"
    monkeypatch.setattr(start, "NEEDED", ("yaml", "no_such_package"))
    message = start.what_to_install() or ""
    assert "needs: no_such_package. Run `" in message and "-m pip install --force-reinstall fast_ft`" in message
    (tmp_path / "Makefile").touch()
    message = start.what_to_install() or ""
    assert "needs: no_such_package. Run `make .venv/run-ready`" in message
    assert "python -m pip install -r requirements-cpu.txt" in message
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "run-ready").touch()
    assert f"Run `source {tmp_path}/.venv/bin/activate` first" in (start.what_to_install() or "")
    assert "make .venv/run-ready" in (start.what_to_install(prefix=str(tmp_path / ".venv")) or ""), "it is active"
