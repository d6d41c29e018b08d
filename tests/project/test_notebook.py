"""The Colab notebook, executed from first cell to last with the quickstart recipe: each step fails once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
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

ADDRESS = "https://github.com/someone/fast_ft"
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
STEPS = ["settings", "machine", "project", "data", "install", "imports", "taste", "run", "check", "take"]


def cells(**values: str) -> list[Any]:
    """The notebook's code cells, with other values for names in capitals."""
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for name, value in values.items():
        found = [cell for cell in code if re.search(rf"^{name} = ", cell.source, re.MULTILINE)]
        assert len(found) == 1, name
        found[0].source = re.sub(rf"^{name} = .*", lambda _, n=name, v=value: f"{n} = {v}", found[0].source, flags=re.M)
    return code


def test_the_notebook_is_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.id for cell in cells()] == STEPS
    assert all(not cell.outputs and cell.execution_count is None for cell in cells())
    assert "message above" not in NOTEBOOK.read_text(encoding="utf-8")


class Colab(InteractiveShell):
    """IPython in this process, where torch is imported already.

    git is run. `python -m fast_ft ...` is a call of main. nvidia-smi, pip and the import of the packages only end, with
    status 0. A command that begins as a key of `fails` ends once with that status instead.
    """

    fails: dict[str, int]
    commands: list[str]

    def system(self, cmd: str) -> None:
        words = shlex.split(self.var_expand(cmd, depth=1))
        if words[0] == sys.executable:
            words[0] = "python"
        self.commands.append(shown := " ".join(words))
        first = next((key for key in self.fails if shown.startswith(key)), None)
        if first is not None:
            self.user_ns["_exit_code"] = self.fails.pop(first)
        elif words[:3] == ["python", "-m", "fast_ft"]:
            self.user_ns["_exit_code"] = main(words[3:])
        elif words[0] == "git":
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            print(done.stderr)
            self.user_ns["_exit_code"] = done.returncode
        else:
            assert shown.startswith(("nvidia-smi -L", "python -m pip install ", "python -c import torch,")), shown
            self.user_ns["_exit_code"] = 0


class Runtime:
    """A Colab runtime in tmp_path, whose github.com is a folder there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content, self.github = folder / "content", folder / "github"
        self.content.mkdir()
        monkeypatch.chdir(self.content)
        config = folder / "gitconfig"
        config.write_text(
            f'[url "file://{self.github}/"]\n\tinsteadOf = https://github.com/\n'
            "[user]\n\tname = a\n\temail = a@example.com\n"
        )
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
        monkeypatch.setenv("COLUMNS", "120")
        project = self.github / "someone" / "fast_ft"
        project.mkdir(parents=True)
        for name in ("fast_ft", "recipes", "requirements.txt"):
            (project / name).symlink_to(ROOT / name)
        data = self.github / "ericsunkuan" / "ML_Spring2025_HW5"
        (data / "fastchat_alpaca_52k").mkdir(parents=True)
        (data / "fastchat_alpaca_52k" / "dataset_info.json").write_text("{}")
        prompts = json.loads((POCKET.parent / "test.json").read_text(encoding="utf-8"))[::10]
        (data / "test_set_evol_instruct_150.json").write_text(json.dumps(prompts), encoding="utf-8")
        for repository in (project, data):
            for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
                subprocess.run(["git", *words], cwd=repository, check=True)
        self.ids = [row["id"] for row in prompts]
        self.pred = folder / "run" / "pred.json"
        settings = (
            "data.test=data/test_set_evol_instruct_150.json train.max_steps=6 train.warmup_steps=1 select.take=24 "
            "select.deduplicate=exact generate.max_new_tokens=8 generate.batch_size=1 judge.base_prompts=0 "
            f"output_dir={folder}/run"
        )
        self.cells = cells(
            REPOSITORY=repr(ADDRESS), FOLDER=repr(str(self.content / "fast_ft")),
            RECIPE='"recipes/quickstart.yaml"', SETTINGS=repr(settings), TASTE_STEPS="3",
        )  # fmt: skip


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(tmp_path, monkeypatch)


Execute = Callable[..., tuple[str, bool]]


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs a cell in one shell; it returns what the cell printed, and whether it ended well."""
    shell = Colab(config=Config({"HistoryManager": {"enabled": False}}))
    shell.fails, shell.commands = {}, []

    def run(cell: Any, fails: dict[str, int] | None = None) -> tuple[str, bool]:
        shell.fails = fails or {}
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            well = shell.run_cell(cell.source).success
        return written.getvalue(), well

    run.shell = shell  # type: ignore[attr-defined]
    yield run
    shell.restore_sys_module_state()  # it took the place of __main__


def reached_pred_json(runtime: Runtime, said: dict[str, str]) -> None:
    assert "3 of 6 steps" in said["taste"] and said["taste"].count("  before  ") == 10
    assert "going on after step 3 of 6" in said["run"] and "done: " in said["run"]
    assert "pred-untouched" in said["check"] and "FAIL" not in said["check"]
    assert str(runtime.pred) in said["take"]
    assert list(json.loads(runtime.pred.read_text())) == runtime.ids


def test_each_step_may_fail_once_and_is_done_by_running_its_cell_again(runtime: Runtime, execute: Execute) -> None:
    """Each failure is one sentence, no traceback; what was half done is done whole."""
    github, away, folder = runtime.github, runtime.github.with_name("away"), runtime.content / "fast_ft"
    fails = {
        "machine": ("nvidia-smi", 9, "no GPU. Choose Runtime > Change runtime type > T4 GPU, then Run all."),
        "install": ("python -m pip", 1, "Run this cell again: packages that are complete are kept."),
        "imports": ("python -c import", 1, f"report what it printed: {ADDRESS}/issues"),
        "taste": ("python -m fast_ft plan", 2, "run cell 1 after the change, then this cell again."),
        "run": ("python -m fast_ft recipes", 130, "Run it again, and it goes on from the last saved step."),
        "check": ("python -m fast_ft submit", 2, "Change SETTINGS in cell 1, then Run all."),
    }
    said: dict[str, str] = {}
    for cell in runtime.cells:
        if cell.id in ("project", "data"):
            half = folder if cell.id == "project" else folder / "data"
            for left in (half, half.with_name(half.name + ".part")):  # by a clone that was killed
                (left / ".git").mkdir(parents=True)
            github.rename(away)
            failed(execute(cell), "could not be cloned. Run this cell again.")
            away.rename(github)
        elif cell.id in fails:
            command, status, sentence = fails[cell.id]
            failed(execute(cell, {command: status}), sentence)
        said[cell.id], well = execute(cell)
        assert well, said[cell.id]
        again, well = execute(cell) if cell.id in ("project", "data", "take") else ("", True)
        assert well, again
    reached_pred_json(runtime, said)
    assert (folder / "data" / "test_set_evol_instruct_150.json").is_file()
    assert {path.name for path in runtime.content.iterdir()} == {"fast_ft", "fast_ft.old1", "constraints.txt"}


def failed(result: tuple[str, bool], sentence: str) -> None:
    said, well = result
    assert not well
    assert "Traceback" not in said and "Error" not in said
    assert said.strip().splitlines()[-1].endswith(sentence), said


def test_status_3_is_a_sentence_and_no_failure(runtime: Runtime, execute: Execute) -> None:
    by_id = {cell.id: cell for cell in runtime.cells}
    assert execute(by_id["settings"])[1]
    said, well = execute(by_id["run"], {"python -m fast_ft": 3})
    assert well and "missed a limit of its recipe" in said
    failed(execute(by_id["run"], {"python -m fast_ft": 137}), "finished steps are kept.")
    failed(execute(by_id["run"], {"python -m fast_ft": 1}), f"{ADDRESS}/issues")
    failed(execute(by_id["check"]), 'until its last lines say "done:".')


def test_without_an_address_there_is_one_sentence(runtime: Runtime, execute: Execute) -> None:
    by_id = {cell.id: cell for cell in cells(FOLDER=repr(str(runtime.content / "fast_ft")))}
    assert execute(by_id["settings"])[1]
    failed(execute(by_id["project"]), "Write the address there, then run cell 1 again.")
    shutil.copytree(runtime.github / "someone" / "fast_ft", runtime.content / "fast_ft", symlinks=True)
    assert execute(by_id["project"])[1], "a folder that is there is taken as it is"


@pytest.mark.parametrize(
    ("torch", "kept"),
    [
        ("2.9.1+cu126", None),
        ("2.10.0+cu128", "torch==2.10.0+cu128 torchvision==0.25.0 torchao==0.16.* xformers==0.0.35"),
        ("2.11.0+cu128", "torch==2.11.0+cu128 torchvision==0.25.0 torchao==0.17.* xformers==0.0.35"),
        ("2.12.1", "torch==2.12.1 torchvision==0.25.0"),
        ("", ""),
    ],
)
def test_the_runtimes_own_torch_is_kept(
    torch: str, kept: str | None, runtime: Runtime, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if not torch:
            raise importlib.metadata.PackageNotFoundError(package)
        return {"torch": torch, "torchvision": "0.25.0"}[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    by_id = {cell.id: cell for cell in runtime.cells}
    assert execute(by_id["settings"])[1]
    if kept is None:
        failed(execute(by_id["machine"]), "Runtime version, then Runtime > Run all.")
        return
    assert execute(by_id["machine"])[1] and execute(by_id["install"])[1]
    assert (runtime.content / "constraints.txt").read_text().split() == kept.split()
    assert f"--constraint {runtime.content}/constraints.txt" in execute.shell.commands[-1]


def test_the_notebook_knows_what_the_requirements_ask() -> None:
    requirements = "".join((ROOT / name).read_text() for name in ("requirements-gpu.txt", "requirements-cpu.txt"))
    text = NOTEBOOK.read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^xformers==(\S+)", requirements, re.MULTILINE)
    assert set(re.findall(r'xformers\\": \\"([^"\\]+)', text)) == {pinned}
    assert re.search(r"^torch>=2\.10,<=2\.13\.", requirements, re.MULTILINE) and "<= (2, 13)" in text
    for torch, torchao in re.findall(r'\\"(2\.1\d)\\": \{\\"torchao\\": \\"(0\.1\d)', text):
        assert f"| {torch} | {torchao} | {pinned} |" in text


@pytest.mark.soak
def test_the_notebook_runs_in_a_kernel(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With new processes; pip and unsloth are empty modules, nvidia-smi an empty command."""
    programs = tmp_path / "programs"
    (programs / "pip").mkdir(parents=True)
    for name in ("pip/__init__.py", "pip/__main__.py", "unsloth.py"):
        (programs / name).touch()
    (programs / "nvidia-smi").write_text("#!/bin/sh\n")
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(programs))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.v4.new_notebook(cells=runtime.cells)
    place = {"metadata": {"path": str(runtime.content)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    reached_pred_json(
        runtime, {cell.id: "".join(each.get("text", "") for each in cell.outputs) for cell in runtime.cells}
    )
