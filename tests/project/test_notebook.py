"""The Colab notebook, executed from first cell to last with the quickstart recipe, on the working copy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config

from fast_ft.cli.main import main
from tests.helpers.parts import POCKET, ROOT

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


def test_the_notebook_is_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code] == ["get", "taste", "run", "check", "take"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


class Here(InteractiveShell):
    """IPython in this process, where torch is imported already: `!python -m fast_ft ...` is a call of main."""

    def system(self, cmd: str) -> None:
        _, minus_m, program, *arguments = shlex.split(self.var_expand(cmd, depth=1))
        assert (minus_m, program) == ("-m", "fast_ft"), cmd
        self.user_ns["_exit_code"] = main(arguments)


def in_this_process(cells: list[Any], folder: Path) -> dict[str, str]:
    """Run the cells as Colab does, but for new processes; return {cell id: what it printed}."""
    shell, said, before = Here(config=Config({"HistoryManager": {"enabled": False}})), {}, Path.cwd()
    os.chdir(folder)
    try:
        for cell in cells:
            written = io.StringIO()
            with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
                shell.run_cell(cell.source).raise_error()
            said[cell.id] = written.getvalue()
    finally:
        os.chdir(before)
        shell.restore_sys_module_state()  # it took the place of __main__
    return said


def in_a_kernel(cells: list[Any], folder: Path) -> dict[str, str]:
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs) for cell in cells}


@pytest.mark.parametrize("execute", [in_this_process, pytest.param(in_a_kernel, marks=pytest.mark.soak)])
def test_the_notebook_runs_to_pred_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execute: Callable[[list[Any], Path], dict[str, str]]
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("COLUMNS", "120")
    prompts = json.loads((POCKET.parent / "test.json").read_text(encoding="utf-8"))[::10]
    (tmp_path / "test.json").write_text(json.dumps(prompts), encoding="utf-8")
    settings = (
        f"data.test={tmp_path}/test.json train.max_steps=6 train.warmup_steps=1 select.take=24 "
        f"select.deduplicate=exact generate.max_new_tokens=8 generate.batch_size=1 judge.base_prompts=0 "
        f"output_dir={tmp_path}/run"
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.id == "get")
    for old, new in (
        ('FOLDER = "/content/fast_ft"', f"FOLDER = {str(ROOT)!r}"),
        ('RECIPE = "recipes/strong.yaml"', 'RECIPE = "recipes/quickstart.yaml"'),
        ('SETTINGS = ""', f"SETTINGS = {settings!r}"),
        ("TASTE_STEPS = 20", "TASTE_STEPS = 3"),
    ):
        assert first.source.count(old) == 1, old
        first.source = first.source.replace(old, new)
    said = execute([cell for cell in notebook.cells if cell.cell_type == "code"], tmp_path)
    assert "3 of 6 steps" in said["taste"] and said["taste"].count("  before  ") == 10
    assert "going on after step 3 of 6" in said["run"] and "done: " in said["run"]
    assert "pred-untouched" in said["check"] and "FAIL" not in said["check"]
    assert str(tmp_path / "run" / "pred.json") in said["take"]
    assert list(json.loads((tmp_path / "run" / "pred.json").read_text())) == [row["id"] for row in prompts]
