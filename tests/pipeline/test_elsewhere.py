"""A run folder from elsewhere: no command on it writes outside it, asks a server, or spends what was not said.

Its recipe names places, servers, trackers and limits of another machine, or of somebody who means harm.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli import chat
from fast_ft.cli.main import main
from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.judge import pricing
from fast_ft.judge.reply_cache import FILE, ReplyCache
from fast_ft.pipeline.rerun import judge_again
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Judge
from fast_ft.run.folder import RunDir
from tests.helpers.parts import answered, write_recipe

#: What the folder's recipe wants; `HERE` stands for the test's own folder.
WISHES: dict[str, dict[str, Any]] = {
    "": {"output_dir": "HERE/harm/output", "backup_dir": "HERE/harm/backup"},
    "train": {"report_to": "wandb"},
    "budget": {"generate_minutes": 600.0, "memory_gib": 1.0},
    "judge": {"kind": "openai", "model": "gpt-4o", "max_requests": 100_000, "max_dollars": 999.0,
              "dollars_per_million_tokens": [0.0, 0.0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def one_run(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    path = write_recipe(folder, tiny, train_file, test_file, {"train.max_steps": 1, "train.warmup_steps": 0})
    return run(load_recipe(path), path).root


@pytest.fixture
def brought(one_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The run's folder in a folder of the test's own, with WISHES in its recipe; every connection is an error."""
    shutil.copytree(one_run, tmp_path / "runs" / "brought")
    folder = RunDir.at(tmp_path / "runs" / "brought")
    recipe = folder.manifest()["recipe"]
    for section, values in WISHES.items():
        wished = json.loads(json.dumps(values).replace("HERE", str(tmp_path)))
        (recipe[section] if section else recipe).update(wished)
    atomic_files.write_json(folder.manifest_path, folder.manifest() | {"recipe": recipe})
    monkeypatch.chdir(tmp_path)

    def connect(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return folder


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("command", ["generate", "report", "judge", "submit", "runs", "chat"])
def test_what_a_command_writes_is_in_the_folder(
    command: str, brought: RunDir, test_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name for name in files(tmp_path) if not name.startswith("runs/brought/")}
    if command == "chat":

        def ask(_: str) -> str:
            raise EOFError

        chat.chat(brought.root, [], ask=ask, out=io.StringIO())
    else:
        more = {
            "generate": ["generate.max_new_tokens=2"],
            "judge": ["judge.kind=reference", f"judge.references={_references(test_file, brought.root)}"],
        }
        words = [command, "runs" if command == "runs" else str(brought.root), *more.get(command, [])]
        assert main(words) == (2 if command == "submit" else 0)  # submit names the tracker's rule
    assert {name for name in files(tmp_path) if not name.startswith("runs/brought/")} == before
    capsys.readouterr()


def _references(prompts: Path, folder: Path) -> Path:
    (folder / "references.json").write_text(answered(prompts, "y"))
    return folder / "references.json"


def test_a_folders_recipe_spends_no_more_than_the_usual(
    brought: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-3b1f0e77c2d94d10")
    long = {key: entry | {"output": ["word " * 400_000]} for key, entry in json.loads(brought.pred.read_text()).items()}
    atomic_files.write_json(brought.pred, long)
    with pytest.raises(InputError, match=r"judge.max_dollars: 1, but this may cost .*Nothing was asked"):
        judge_again(brought.root, [], dry_run=True)
    assert "judge.max_dollars: the folder's recipe allows 999, and 1 holds here" in capsys.readouterr().err
    judge_again(brought.root, ["judge.max_dollars=999", "judge.max_requests=100"], dry_run=True)
    said = capsys.readouterr()
    assert "at most 8." in said.out and "judge.max_" not in said.err


def test_caps_that_are_lower_and_prices_that_are_higher_stay() -> None:
    own = Judge(kind="openai", model="gpt-4o", max_requests=3, max_dollars=0.1, dollars_per_million_tokens=(5.0, 1.0))
    found = pricing.bounded(own, [])
    assert (found.max_requests, found.max_dollars, found.dollars_per_million_tokens) == (3, 0.1, (5.0, 10.0))
    assert pricing.bounded(own, ["judge.dollars_per_million_tokens"]) == own
    unknown = own.model_copy(update={"model": "of-ones-own"})
    assert pricing.bounded(unknown, []) == unknown


def test_replies_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("before")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / FILE).symlink_to("../victim")
    with (
        pytest.raises(InputError, match=r"verdicts\.jsonl is a link to .*victim"),
        ReplyCache(tmp_path / "runs" / FILE).locked(),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "before"


def test_a_report_fetches_nothing(
    brought: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    recipe = brought.manifest()["recipe"]
    recipe["data"]["train"] = recipe["judge"]["references"] = "someone/rows"
    atomic_files.write_json(brought.manifest_path, brought.manifest() | {"recipe": recipe})
    assert main(["report", str(brought.root)]) == 0
    page = brought.report.read_text(encoding="utf-8")
    assert "No data map" in page and "someone/rows is not in the hub" in page
    with download.nothing_fetched(), pytest.raises(InputError, match="this command fetches nothing"):
        download.model_folder("someone/base")
    capsys.readouterr()
