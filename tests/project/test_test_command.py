"""What the test command promises: a test that never ends is ended, and tests that did not run are named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.parts import ROOT
from tests.helpers.patience import PATIENCE


def run_pytest(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest, with the plugins named alone, as the project configures it on the tests of a folder."""
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", str(folder), *words],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | environment,
    )  # fmt: skip


def test_an_endless_loop_is_ended_and_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert float(request.config.getini("timeout")) > 0, "pytest-timeout is missing, or pyproject.toml sets no limit"
    (tmp_path / "test_endless.py").write_text("def test_it():\n    while True:\n        pass\n")
    done = run_pytest(tmp_path, "-p", "pytest_timeout", "-o", "timeout=0.2")
    assert done.returncode == 1 and "Failed: Timeout" in done.stdout and "test_endless.py" in done.stdout


def test_a_missing_browser_is_said_in_the_summary(tmp_path: Path) -> None:
    for name in ("__init__.py", "conftest.py", "helpers", "report/test_report_browser.py"):
        here, there = ROOT / "tests" / name, tmp_path / "tests" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
    (tmp_path / "bin").mkdir()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_pytest(tmp_path, "-k", "keyboard or phone or leaves", PATH=str(tmp_path / "bin"), PYTHONPATH=path)
    assert "THE BROWSER TESTS DID NOT RUN" in done.stdout and "no Chromium with chromedriver here" in done.stdout


def test_ci_says_at_its_end_that_there_was_no_browser(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "timeout", "tail", "mktemp", "nice"):
        (tools / name).symlink_to(shutil.which(name) or "")
    make = 'echo make "$@"; if [ "$*" = "$BROKEN" ]; then eval "$HOW"; fi'
    for name, words in {"make": make, "id": "echo 1000"}.items():
        (tools / name).write_text(f"#!{tools}/bash\n{words}\n")
        (tools / name).chmod(0o755)

    def ci(broken: str = "nothing", how: str = "exit 3") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(tools / "bash"), str(tmp_path / ".ci" / "run")],
            capture_output=True,
            text=True,
            env={"PATH": str(tools), "BROKEN": broken, "HOW": how},
        )

    done = ci()
    assert done.returncode == 0 and "make test\n" in done.stdout and "make --silent wheel-test\n" in done.stdout
    assert "THE BROWSER TESTS DID NOT RUN" in done.stderr
    (tools / "chromedriver").symlink_to(tools / "make")
    assert ci().stderr == ""
    kill = (shutil.which("timeout"), tools / "timeout")
    kill[1].unlink()
    kill[1].write_text(f'#!{tools}/bash\nexec {kill[0]} -s KILL 0.5 "${{@:4}}"\n')  # of `-s KILL SECONDS COMMAND`
    kill[1].chmod(0o755)
    late = ci("--silent newest", "while :; do :; done")
    assert late.returncode == 0 and late.stderr == "" and "Killed" not in late.stdout
    assert "newest: not a clean report within 400 s" in late.stdout
    counting = {"test": 3, "--silent wheel-test": 3, ".venv/test-ready": 3}
    for broken, status in {**counting, "--silent newest": 0, "--silent audit": 0}.items():
        assert ci(broken).returncode == status, broken
