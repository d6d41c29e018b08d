"""Handing in: each rule refused by its name, the zip's contents exactly as promised, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import atomic_files, redaction
from fast_ft.common.errors import InputError
from fast_ft.data import contamination
from fast_ft.homework import checks, package, secret_scan
from fast_ft.pipeline.rerun import generate_again
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run import provenance
from fast_ft.run.folder import RunDir
from tests.helpers.parts import ROOT, RecipeFactory, answered, write_recipe

CHANGES = {"lora.lora_dropout": 0.1, "judge": {"kind": "none"}}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_run(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, with data files of its own beside it."""
    folder = tmp_path_factory.mktemp("one")
    for path in (train_file, test_file):
        shutil.copy(path, folder / path.name)
    path = write_recipe(folder, tiny, folder / train_file.name, folder / test_file.name)
    return run(load_recipe(path, [f"output_dir={folder}/run"]), path).root


@pytest.fixture
def finished(one_run: Path, tmp_path: Path) -> RunDir:
    """The run in a folder of the test's own. Its data files stay those of `one_run`."""
    shutil.copytree(one_run, tmp_path / "run")
    return RunDir.at(tmp_path / "run")


@pytest.fixture
def data(one_run: Path) -> Any:
    """The run's data files by name, put back after the test."""
    files = {path.name: path for path in one_run.parent.glob("*.json")}
    before = {path: path.read_bytes() for path in files.values()}
    yield files
    for path, content in before.items():
        path.write_bytes(content)


def failed(folder: RunDir) -> set[str]:
    return {verdict.rule for verdict in checks.broken(checks.check(folder))}


def test_a_run_passes_and_its_zip_holds_what_is_promised(
    finished: RunDir, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(finished.root), "--student-id", "B12901001", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert [line[:4] for line in captured.out.splitlines()] == ["pass"] * 2 + ["--  "] + ["pass"] * 12
    assert "--    model" in captured.out and "not handed in" in captured.err
    with zipfile.ZipFile(tmp_path / "b12901001_hw5.zip") as archive:
        files = {name.removeprefix("b12901001_hw5/"): archive.read(name) for name in archive.namelist()}
    expected = {
        "manifest.json",
        "pred.json",
        "recipe.yaml",
        "REPRODUCE.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    expected |= {path.name for path in ROOT.glob("requirements*.txt")}
    expected |= {str(path.relative_to(ROOT)) for path in provenance.source_files()}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml")}
    assert files.keys() == expected
    rooms = {name.split("/")[1] for name in files if name.startswith("fast_ft/")}
    assert {"train", "generate", "plan", "homework"} < rooms and not rooms & {"sweep", "doctor", "export", "pocket"}
    assert files["pred.json"] == finished.pred.read_bytes()
    assert json.loads(files["manifest.json"]) == finished.manifest()
    everything = b"\n".join(files.values())
    for row in read(train_file):
        assert row["conversations"][0]["value"].encode() not in everything, "a training row"
    assert not [name for name in files if name.endswith((".safetensors", ".jsonl", "report.html", ".png", ".bin"))]
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    assert load_recipe(tmp_path / "recipe.yaml") == finished.recipe(), "complete, and as it was"
    assert finished.manifest()["digests"]["pred"] in files["REPRODUCE.md"].decode()


WATCHED_RUN = """
import json, sys
from pathlib import Path
import fast_ft.__main__ as program
read = set()
sys.addaudithook(lambda event, values: read.add(str(values[0])) if event == "open" else None)
status = program.own_process()
files = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("fast_ft")}
compiler = "torch._inductor.compile_fx" in sys.modules
Path("executed.json").write_text(json.dumps([status, sorted(map(str, files)), sorted(read), compiler]))
"""


def test_every_file_that_a_run_executes_is_in_the_zip(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    """A run, its report and its scores in a process of their own, whose modules and opened files are noted.

    Nothing in it uses torch's compiler, which bitsandbytes would load for a second or two.
    """
    command = [sys.executable, "-c", WATCHED_RUN, str(recipe_file())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, modules, opened, compiler = json.loads((tmp_path / "executed.json").read_text())
    package_ = str(provenance.PACKAGE)
    used = {name for name in (*modules, *opened) if name.startswith(package_) and "__pycache__" not in name}
    assert status == 0 and len(used) > 80 and not compiler
    assert used - {str(path) for path in provenance.source_files()} == set()


def test_the_same_run_gives_the_same_bytes(finished: RunDir, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, two = (package.submit(finished, "b12901001", folder) for folder in (tmp_path, tmp_path / "a"))
    assert one.read_bytes() == two.read_bytes()


def with_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[RunDir, Any], None]:
    def apply(folder: RunDir, _: Any) -> None:
        manifest = folder.manifest()
        change(manifest)
        atomic_files.write_json(folder.manifest_path, manifest)

    return apply


def edit_answer(folder: RunDir, _: Any) -> None:
    pred = read(folder.pred)
    pred["t3"]["output"] = ["A better answer."]
    atomic_files.write_json(folder.pred, pred)


def change_row(_: RunDir, files: dict[str, Path]) -> None:
    rows = read(files["train.json"])
    for row in rows:
        row["conversations"][1]["value"] += " Yes."
    files["train.json"].write_text(json.dumps(rows))


def change_prompts(_: RunDir, files: dict[str, Path]) -> None:
    rows = read(files["test.json"])
    rows[0]["conversations"][0]["value"] = "Another?"
    files["test.json"].write_text(json.dumps(rows))


def swap_adapter(folder: RunDir, _: Any) -> None:
    path = folder.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


def add_rows(manifest: dict[str, Any]) -> None:
    manifest["rows"] = [{"id": f"r{n}", "digest": "0" * 64} for n in range(101)]


def ask_a_training_row(_: RunDir, files: dict[str, Path]) -> None:
    rows, prompts = read(files["train.json"]), read(files["test.json"])
    prompts[0]["conversations"][0]["value"] = max(rows, key=lambda row: row["score"])["conversations"][0]["value"]
    files["test.json"].write_text(json.dumps(prompts))


BREAKS: dict[str, tuple[Callable[[RunDir, Any], None], set[str]]] = {
    "one row of the manifest": (with_manifest(lambda m: m["rows"][3].update(digest="0" * 64)), {"rows"}),
    "another row in the manifest": (with_manifest(lambda m: m["rows"][3].update(id="r99")), {"rows"}),
    "a row of the file": (change_row, {"training-file", "rows"}),
    "one answer": (edit_answer, {"pred-untouched"}),
    "the seed": (with_manifest(lambda m: m["recipe"].update(seed=1)), {"seed", "recipe-untouched"}),
    "the 101st row": (with_manifest(add_rows), {"at-most-100-rows", "rows"}),
    "the test file": (change_prompts, {"test-file", "test-ids"}),
    "the adapter": (swap_adapter, {"adapter-untouched"}),
    "the certificate": (with_manifest(lambda m: m.pop("leakage")), {"leakage-certificate"}),
    "a hit that nobody finds": (
        with_manifest(lambda m: m["leakage"].update(hits=[{"example": "r4", "prompt": "t0", "kind": "exact"}])),
        {"leakage-certificate"},
    ),
    "a hit that the certificate lacks": (ask_a_training_row, {"leakage-certificate", "test-file", "test-ids"}),
    "a row left out because of a test prompt": (
        with_manifest(lambda m: m["recipe"]["data"].update(exclude=["0" * 16, contamination.text_digest("  why")])),
        {"test-shapes-nothing", "recipe-untouched"},
    ),
    "a training that a clock ended": (
        with_manifest(lambda m: m["phases"]["train"].update(why="budget", stopped_at_step=3, of_steps=6)), {"no-clock"},
    ),
    "answers that a clock cut": (
        with_manifest(lambda m: m["phases"]["generate"].update(cut_by_budget=2, cut_at=4)), {"no-clock"},
    ),
    "16 bits": (
        with_manifest(lambda m: m["recipe"]["model"].update(load_in_4bit=False)), {"4-bits", "recipe-untouched"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_change_is_refused_by_the_rules_name(case: str, finished: RunDir, data: Any, tmp_path: Path) -> None:
    change, rules = BREAKS[case]
    change(finished, data)
    found = failed(finished)
    assert rules <= found <= rules | {"rows", "leakage-certificate"}
    with pytest.raises(InputError, match=r"not written") as refused:
        package.submit(finished, "b12901001", tmp_path)
    assert all(rule in str(refused.value) for rule in rules)
    assert not list(tmp_path.glob("*.zip"))


def test_another_seed_is_refused_though_the_run_is_honest(recipe_file: RecipeFactory) -> None:
    path = recipe_file({"seed": 1, "train.max_steps": 1, "train.warmup_steps": 0})
    assert failed(run(load_recipe(path), path)) == {"seed"}


def test_a_planted_hit_is_reported_and_cannot_be_left_out(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = max(read(train_file), key=lambda row: row["score"])
    prompt = {"id": "same", "conversations": [{"from": "human", "value": row["conversations"][0]["value"].upper()}]}
    (tmp_path / "asked.json").write_text(json.dumps([prompt]))
    path = recipe_file({"data.test": str(tmp_path / "asked.json"), "train.max_steps": 1, "train.warmup_steps": 0})
    folder = run(load_recipe(path), path)
    assert main(["submit", str(folder.root), "--student-id", "b12901001", "--output", str(tmp_path)]) == 0
    assert "note: a test prompt's text is in 1 row" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "b12901001_hw5.zip") as archive:
        certificate = json.loads(archive.read("b12901001_hw5/manifest.json"))["leakage"]
    assert certificate["hits"] == [{"example": row["id"], "prompt": "same", "kind": "normalised"}]
    with_manifest(lambda m: m["leakage"].update(hits=[]))(folder, None)
    assert failed(folder) == {"leakage-certificate"}


def test_another_prompt_or_a_missing_one_breaks_the_test_ids(finished: RunDir) -> None:
    pred = read(finished.pred)
    pred["t0"]["input"][0]["content"] += "!"
    del pred["t1"]
    atomic_files.write_json(finished.pred, pred)
    (verdict,) = [each for each in checks.check(finished) if each.rule == "test-ids"]
    assert "1 missing, such as 't1'; 1 with another prompt" in verdict.text


def test_under_the_homeworks_rules_the_model_is_checked(finished: RunDir) -> None:
    with_manifest(lambda m: m["recipe"].update(rules="ntu-ml-2025-hw5"))(finished, None)
    (verdict,) = [each for each in checks.check(finished) if each.rule == "model"]
    assert verdict.passed is False and "LLaMA2-7B has 4096" in verdict.text


def test_a_run_that_is_not_finished_is_refused(recipe_file: RecipeFactory) -> None:
    path = recipe_file()
    folder = RunDir.open(load_recipe(path), path)
    with pytest.raises(InputError, match=r"not finished \(train, generate to do\)"):
        checks.check(folder)


@pytest.mark.parametrize(
    "text", ["", "12901001", "b1290100", "b129010011", "../b12901001", "b1290100\u0661", "b12/01001"]
)
def test_student_ids_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a student id has a letter and eight more"):
        package.checked_id(text)


def test_student_ids() -> None:
    assert package.checked_id("B12901001") == "b12901001" and package.checked_id("r12k41005") == "r12k41005"


def test_keys_never_get_in(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "not-of-any-known-shape-4711"
    monkeypatch.setenv("HF_TOKEN", secret)
    finished.update(notes=[f"the hub said {secret}"])
    with pytest.raises(InputError, match=r"manifest\.json, line \d+: the value of HF_TOKEN") as refused:
        package.submit(finished, "b12901001", tmp_path)
    assert secret not in str(refused.value) and not list(tmp_path.glob("*.zip"))


def test_key_shapes_are_found_and_never_shown() -> None:
    keys = ["hf_" + "a1" * 17, "sk-proj-" + "b2" * 20, "ghp_" + "c3" * 18, "AKIA" + "ABCD" * 4, "http://me:pass@host/x"]
    for key in keys:
        (found,) = secret_scan.findings("x.yaml", f"first\nkey: {key}\n", {})
        assert found.startswith("x.yaml, line 2: ") and key not in found
    assert secret_scan.findings("x", "task-based sketches, hf_hub, ask-me-anything, https://a.b/c:d@e", {}) == []
    assert redaction.values({"OPENAI_API_KEY": "12345678", "HF_TOKEN": "short", "HOME": "/home/someone"}) == {
        "12345678": "OPENAI_API_KEY"
    }


def test_a_full_disk_and_ctrl_c_leave_the_former_zip(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b12901001_hw5.zip"
    path.write_bytes(b"former")
    for error, expected in (
        (OSError(28, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises(expected):
            patch.setattr(atomic_files.os, "fsync", fail)
            package.submit(finished, "b12901001", tmp_path)
        assert path.read_bytes() == b"former" and len(list(tmp_path.iterdir())) == 2


def test_answers_generated_again_can_be_handed_in_and_lose_their_scores(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    former = finished.manifest()["digests"]["pred"]
    atomic_files.write_json(finished.scores, {"kind": "openai", "mean": 4.2, "pred": former})
    finished.finish("judge", 1.0, mean=4.2)
    generate_again(finished.root, ["generate.max_new_tokens=3"])
    assert not finished.scores.exists() and finished.done("judge") is None
    assert read(finished.root / f"scores-{former[:8]}.json")["mean"] == 4.2
    assert "scores.json was of the former answers" in capsys.readouterr().err
    assert failed(finished) == set()


def test_answers_to_other_prompts_have_files_of_their_own(
    finished: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {name: getattr(finished, name).read_bytes() for name in ("pred", "answers")}
    prompts = [{"id": f"o{i}", "conversations": [{"from": "human", "value": f"Name {i} hats."}]} for i in range(3)]
    (tmp_path / "more prompts.json").write_text(json.dumps(prompts))
    given = f"data.test={tmp_path / 'more prompts.json'}"
    (tmp_path / "references.json").write_text(answered(tmp_path / "more prompts.json", "Hats."))
    judged = [
        "judge",
        str(finished.root),
        given,
        "judge.kind=reference",
        f"judge.references={tmp_path}/references.json",
    ]
    assert main(judged) == 2 and "were not answered yet" in capsys.readouterr().err
    for limit in (3, 2):
        assert main(["generate", str(finished.root), given, f"generate.max_new_tokens={limit}"]) == 0
    said = capsys.readouterr().err
    others = finished.others(
        str(tmp_path / "more prompts.json"), atomic_files.sha256_file(tmp_path / "more prompts.json")
    )
    assert others.pred.name in said and others.pred.name.startswith("pred-more_prompts-")
    assert list(read(others.pred)) == [row["id"] for row in prompts]
    (facts,) = finished.manifest()["others"].values()
    assert facts["generated_with"]["max_new_tokens"] == 2 and facts["digests"]["pred"] == atomic_files.sha256_file(
        others.pred
    )
    assert len(list(finished.root.glob(f"{others.pred.stem}-*.json"))) == 1, "the former answers are kept beside"
    assert main(judged) == 0
    assert read(others.scores)["count"] == 3 and not finished.scores.exists() and finished.done("judge") is None
    assert {name: getattr(finished, name).read_bytes() for name in own} == own and failed(finished) == set()
