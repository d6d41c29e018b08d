"""The Colab notebook, executed from first cell to last with the quickstart recipe, on the working copy."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from conftest import POCKET, ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


def test_the_notebook_is_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code] == ["get", "taste", "run", "check", "take"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_notebook_runs_to_pred_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "3 of 6 steps" in said["taste"] and said["taste"].count("  before  ") == 10
    assert "going on after step 3 of 6" in said["run"] and "done: " in said["run"]
    assert "pred-untouched" in said["check"] and "FAIL" not in said["check"]
    assert str(tmp_path / "run" / "pred.json") in said["take"]
    assert list(json.loads((tmp_path / "run" / "pred.json").read_text())) == [row["id"] for row in prompts]
