"""Doing a submitted run again: identical in another folder; hostile zips and broken rules are refused untrained."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common.errors import InputError
from fast_ft.data.contamination import text_digest
from fast_ft.homework import archive as bundle
from fast_ft.homework import package
from fast_ft.homework.reproduce import replayed, reproduce
from fast_ft.hub import fingerprint
from fast_ft.pipeline.run import run
from fast_ft.recipe import key_owners
from fast_ft.recipe.loader import content_digest, load_recipe, resolved
from fast_ft.recipe.schema import Budget, Judge, Recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import write_recipe

TOP = "b12901001_hw5"


@pytest.fixture(scope="module")
def handed_in(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's zip; a recipe with everything that draws: sampling, dropout, noise."""
    folder = tmp_path_factory.mktemp("there")
    changes = {"lora.lora_dropout": 0.1, "train.neftune_noise_alpha": 5, "generate.do_sample": True}
    path = write_recipe(folder, tiny, train_file, test_file, changes)
    return package.submit(run(load_recipe(path), path), "b12901001", folder)


def changed(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a copy of a zip whose JSON files {name: content} went through `change`."""
    files = {name.removeprefix(f"{TOP}/"): content for name, content in bundle.members(path).items()}
    parsed = {name: json.loads(files[name]) for name in ("manifest.json", "pred.json")}
    change(parsed)
    for name, content in parsed.items():
        if content != json.loads(files[name]):
            files[name] = json.dumps(content).encode()
    target.write_bytes(package.packed(files, TOP))
    return target


def test_in_another_folder_all_is_identical(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", str(handed_in), "--train", str(train_file), "--test", str(test_file), "--model", str(tiny)]
    assert main(words) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["adapter"] == "identical" and lines["answers"] == "5 of 5 identical (100.0%)"
    assert lines["versions"] == lines["program"] == "the same" and lines["card"] == "the same (none)"
    (folder,) = tmp_path.glob("runs/reproduced/b12901001_hw5-*")
    assert RunDir.at(folder).manifest()["reproduction_of"] == handed_in.name
    assert json.loads((folder / "reproduction.json").read_text())["share"] == 1.0


def test_the_program_in_the_zip_reproduces_the_run(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    """Unpacked into an empty folder, with this environment's packages and nothing else of the project."""
    with zipfile.ZipFile(handed_in) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-m", "fast_ft", "reproduce", str(handed_in), "--train", str(train_file),
               "--test", str(test_file), "--model", str(tiny)]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run_there(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=tmp_path / TOP, env=environment, capture_output=True, text=True)

    done = run_there(command)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["answers"] == "5 of 5 identical (100.0%)" and lines["program"] == "the same"
    done = run_there([*command[:3], "doctor"])
    assert done.returncode == 2 and "this copy of the program has no fast_ft.doctor" in done.stderr


def test_an_edited_answer_is_found_even_where_the_digest_was_edited_too(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(files: dict[str, Any]) -> None:
        files["pred.json"]["t3"]["output"] = ["Mine\x1b[2J \u202eback\nwards."]
        files["manifest.json"]["environment"]["packages"]["torch"] = "0.1\x1b[31m"
        files["manifest.json"]["plan"]["world_size"] = 2
        text = json.dumps(files["pred.json"]).encode()
        files["manifest.json"]["digests"]["pred"] = hashlib.sha256(text).hexdigest()

    path = changed(handed_in, tmp_path / "edited.zip", edit)
    result = reproduce(path, train=str(train_file), test=str(test_file), model=str(tiny), output=tmp_path / "again")
    assert (result["adapter"], result["identical"], result["answers"]) == (True, 4, 5)
    assert result["first"]["id"] == "t3"
    out = capsys.readouterr().out
    assert r"Mine\u001b[2J \u202eback\nwards." in out and "\x1b" not in out and "\u202e" not in out
    order = [line.split()[0] for line in out.splitlines()]
    assert order.index("versions") < order.index("rows") < order.index("adapter")
    assert "torch 0.1\\u001b[31m there" in out and "2 trained it, one will train here" in out


def test_what_differs_is_said_and_ends_with_status_3(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One folder is reproduced once; each zip is then compared with what lies there."""

    def answer(files: dict[str, Any]) -> None:
        files["pred.json"]["t0"]["output"] = ["Mine."]
        content = json.dumps(files["pred.json"]).encode()
        files["manifest.json"]["digests"]["pred"] = hashlib.sha256(content).hexdigest()

    def adapter(files: dict[str, Any]) -> None:
        files["manifest.json"]["digests"]["adapter"] = "0" * 64

    cases: list[tuple[Callable[[dict[str, Any]], None], int, str, str]] = [
        (lambda files: None, 0, "identical", "5 of 5 identical (100.0%)"),
        (adapter, 3, "differs", "5 of 5 identical (100.0%)"),
        (answer, 3, "identical", "4 of 5 identical (80.0%)"),
    ]
    for change, status, weights, answers in cases:
        path = changed(handed_in, tmp_path / "x.zip", change)
        words = ["reproduce", str(path), "--train", str(train_file), "--test", str(test_file), "--model", str(tiny)]
        assert main([*words, "--output", str(tmp_path / "again")]) == status
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert (lines["adapter"], lines["answers"]) == (weights, answers)
        result = json.loads((tmp_path / "again" / "reproduction.json").read_text())
        assert result["adapter"] is (weights == "identical")


#: What a zip might want of the machine on which it is done again.
WISHES = {
    "output_dir": "elsewhere/output", "backup_dir": "elsewhere/backup",
    "budget": {"gpu": "t4", "memory_gib": 1.0, "train_minutes": 0.001, "generate_minutes": 0.001},
    "judge": {"kind": "openai", "base_prompts": 2, "max_dollars": 999.0, "references": "elsewhere/references.json"},
}  # fmt: skip


def test_no_place_no_server_and_no_budget_of_a_zip_is_obeyed(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def wish(files: dict[str, Any]) -> None:
        manifest = files["manifest.json"]
        for key, value in WISHES.items():
            recipe = manifest["recipe"]
            recipe[key] = recipe[key] | value if isinstance(value, dict) else value
        manifest["recipe_digest"] = content_digest(manifest["recipe"])  # an honest run with these keys

    monkeypatch.chdir(tmp_path)
    path = changed(handed_in, tmp_path / "wishes.zip", wish)
    result = reproduce(path, train=str(train_file), test=str(test_file), model=str(tiny), output=Path("again"))
    assert (result["adapter"], result["share"]) == (True, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "wishes.zip"], "nothing is written elsewhere"
    recipe = RunDir.at("again").recipe()
    assert (recipe.output_dir, recipe.backup_dir, recipe.judge, recipe.budget) == ("again", None, Judge(), Budget())


def test_a_folder_that_a_zip_names_must_be_given(
    handed_in: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the base model was the folder .* give yours with --model FOLDER"):
        reproduce(handed_in, train=str(train_file), test=str(test_file), output=tmp_path / "again")
    assert "--model BASE_FOLDER" in bundle.members(handed_in)[f"{TOP}/REPRODUCE.md"].decode()
    path = changed(handed_in, tmp_path / "x.zip", lambda f: f["manifest.json"]["recipe"]["model"].update(
        tokenizer="//server/tokenizer"))  # fmt: skip
    theirs = bundle.read(path)
    own = {"data.train": "a", "data.test": "b", "output_dir": "c", "model.name_or_path": "d"}
    with pytest.raises(InputError, match=r"tokenizer was the folder '//server/tokenizer'.*--tokenizer FOLDER"):
        replayed(theirs, own)
    assert replayed(theirs, own | {"model.tokenizer": "e"}).model.tokenizer == "e"


def test_a_base_model_of_the_hub_is_taken_at_its_commit(handed_in: Path, tmp_path: Path) -> None:
    def of_the_hub(files: dict[str, Any], commit: str) -> None:
        files["manifest.json"]["recipe"]["model"]["name_or_path"] = "someone/base"
        files["manifest.json"]["model"]["commit"] = commit

    own = {"data.train": "a", "data.test": "b", "output_dir": "c"}
    path = changed(handed_in, tmp_path / "x.zip", lambda files: of_the_hub(files, "0123456789" * 4))
    model = replayed(bundle.read(path), own).model
    assert (model.name_or_path, model.revision) == ("someone/base", "0123456789" * 4)
    path = changed(handed_in, tmp_path / "x.zip", lambda files: of_the_hub(files, "../../x"))
    with pytest.raises(InputError, match=r"model\.commit"):
        bundle.read(path)


def test_every_key_of_a_recipe_has_an_owner() -> None:
    """A new key goes into recipe/key_owners.py: is it a part of the run, or the machine's on which the run is made?"""
    assert sorted(key_owners.OWNERS) == sorted(key for key, _ in key_owners.fields())
    recipe = Recipe.model_validate({"model": {"name_or_path": "m"}, "data": {"train": "d"}})
    leaves = [key for key, _ in _leaves(resolved(recipe))]
    assert set(leaves) <= {*key_owners.OWNERS, "curriculum.stages"} and len(leaves) > 70


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with(recipe: dict[str, Any], **values: Any) -> dict[str, Any]:
    return recipe | {"data": recipe["data"] | values}


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an answer": (lambda f: f["pred.json"]["t3"].update(output=["Mine."]), "pred-untouched: "),
    "a row": (lambda f: f["manifest.json"]["rows"][2].update(digest="0" * 64), "rows: .*1 differ"),
    "the seed": (lambda f: f["manifest.json"]["recipe"].update(seed=1), "seed: 1; "),
    "a clock": (lambda f: f["manifest.json"]["phases"]["generate"].update(cut_by_budget=1, cut_at=2), "no-clock: "),
    "a row left out because of a test prompt": (
        lambda f: f["manifest.json"].update(
            recipe=(recipe := _with(f["manifest.json"]["recipe"], exclude=[text_digest("Why?")])),
            recipe_digest=content_digest(recipe),
        ),
        "test-shapes-nothing: .*'t3'",
    ),
    "101 rows": (
        lambda f: f["manifest.json"].update(rows=[{"id": str(n), "digest": ""} for n in range(101)]),
        "at-most-100-rows: 117 ",
    ),
    "a way that is not here": (
        lambda f: f["manifest.json"]["phases"]["train"].update(backend="unsloth"),
        "trained through 'unsloth' and is repeated through nothing else",
    ),
    "no plan": (lambda f: f["manifest.json"].pop("plan"), "manifest.json: plan: Field required"),
    "an unknown plan": (lambda f: f["manifest.json"]["plan"].update(turbo=1), "does not know"),
    "a wrong plan": (lambda f: f["manifest.json"]["plan"].update(micro_batch="8"), "micro_batch is of type str"),
    "a wrong phase": (lambda f: f["manifest.json"].update(phases=[]), "manifest.json: phases"),
    "no object": (lambda f: f.update({"manifest.json": [1]}), "no JSON object"),
    "no answers": (lambda f: f.update({"pred.json": {"a": 1}}), "holds no answers"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_rule_is_named_and_nothing_is_trained(
    case: str, handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    change, message = BREAKS[case]
    path = changed(handed_in, tmp_path / "x.zip", change)
    with pytest.raises(InputError, match=message):
        reproduce(path, train=str(train_file), test=str(test_file), model=str(tiny), output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_other_rows_and_other_prompts_are_refused(
    handed_in: Path, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    rows = json.loads(train_file.read_text())
    rows[4]["conversations"][1]["value"] += " Yes."
    (tmp_path / "train.json").write_text(json.dumps(rows))
    prompts = json.loads(test_file.read_text())[1:]
    (tmp_path / "test.json").write_text(json.dumps(prompts))
    with pytest.raises(InputError, match=r"rows: [\s\S]*test-ids: 1 ids"):
        reproduce(handed_in, train=str(tmp_path / "train.json"), test=str(tmp_path / "test.json"), model=str(tiny))


HOSTILE = {
    "a way out": (f"{TOP}/../../evil.py", "would leave its folder"),
    "an absolute path": ("/etc/evil", "would leave its folder"),
    "a backslash": (f"{TOP}\\..\\evil", "would leave its folder"),
    "a drive": ("C:evil", "would leave its folder"),
    "a second folder": ("other/evil", "one folder at its top"),
    "the same name": (f"{TOP}/pred.json", "two members are called"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_zip_is_refused(case: str, handed_in: Path, tmp_path: Path) -> None:
    name, message = HOSTILE[case]
    path = tmp_path / "evil.zip"
    path.write_bytes(handed_in.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    before = {*tmp_path.parent.rglob("*")}
    with pytest.raises(InputError, match=message):
        bundle.read(path)
    assert {*tmp_path.parent.rglob("*")} == before


def test_links_bombs_and_broken_zips_are_refused(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo(f"{TOP}/pred.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{TOP}/zeros", b"\0" * (bundle.MOST_BYTES + 1))
    whole = handed_in.read_bytes()
    lying = bytearray(bomb.getvalue())
    at = lying.rindex(b"PK\x01\x02") + 24  # the size in the directory
    lying[at : at + 4] = (1000).to_bytes(4, "little")
    cases = {
        buffer.getvalue(): "no plain file",
        bomb.getvalue(): "MiB unpacked",
        bytes(lying): "not the size|not a whole zip",
        whole[: len(whole) // 2]: "not a whole zip file",
        b"": "not a whole zip file",
    }
    for content, message in cases.items():
        path = tmp_path / "x.zip"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            bundle.read(path)
    with pytest.raises(InputError, match="no such file"):
        bundle.read(tmp_path / "nowhere.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused_before_they_are_unpacked(method: int, handed_in: Path, tmp_path: Path) -> None:
    """A damaged LZMA member raises what no other does, and its header can ask for 4 GiB."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in bundle.members(handed_in).items():
            archive.writestr(name, content)
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    for each in (path.read_bytes(), bytes(content)):
        path.write_bytes(each)
        with pytest.raises(InputError, match="Only deflate is read"):
            bundle.read(path)


def test_bytes_that_are_no_zip_are_a_message(tmp_path: Path) -> None:
    """Of every field of the directory: other values; and a name that is no UTF-8."""
    whole = package.packed({"pred.json": b"{}"}, TOP)
    start, end = whole.index(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    path = tmp_path / "x.zip"
    for at in range(start, len(whole)):
        for value in (0, 1, 0x80, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(InputError):
                bundle.members(path)
    named = bytearray(whole)
    named[start + 9] |= 0x08  # the flag that says UTF-8
    named[end - 5] = 0xFF
    path.write_bytes(named)
    with pytest.raises(InputError, match=r"not a whole zip file .*codec can't decode"):
        bundle.members(path)


def test_weights_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    (weights,) = tiny.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    (tmp_path / "a").write_bytes(content)
    assert fingerprint.weights_digest(tmp_path / "a") == fingerprint.weights_digest(weights)
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert fingerprint.weights_digest(tmp_path / "a") != fingerprint.weights_digest(weights)
