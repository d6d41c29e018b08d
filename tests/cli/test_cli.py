"""The command line: answers at once, one message for wrong input, nothing half-written, JSON alone on stdout."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import COMMANDS, main
from fast_ft.cli.parser import USAGES, build_parser
from fast_ft.run.folder import RunDir
from tests.helpers import killed
from tests.helpers.parts import POCKET, REAL, ROOT, RecipeFactory, needs_real_data
from tests.helpers.patience import PATIENCE
from tests.helpers.speed import child_seconds


def fast_ft(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fast_ft", *words],
        cwd=cwd, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"} | environment,
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with status 2 and one message; return the message."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    return captured.err[captured.err.index("error: ") :]


# Help and unknown words


def test_help_answers_at_once() -> None:
    """Within 0.3 s on a free machine, and with no library that takes long to import."""
    done = fast_ft("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert child_seconds(lambda: fast_ft("--help"), 0.3) <= 0.3
    told = fast_ft("--help", PYTHONPROFILEIMPORTTIME="1").stderr.splitlines()
    imported = {line.split()[-1].split(".")[0] for line in told}
    assert "fast_ft" in imported and not imported & {"torch", "numpy", "pydantic", "yaml", "pyarrow", "huggingface_hub"}
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout, command
    assert "Exit status: 0 done" in done.stdout


def test_help_speaks_of_overrides_where_a_command_takes_them() -> None:
    for name, parser in build_parser()[1].items():
        assert ("replaces the recipe's value" in parser.format_help()) == USAGES[name].takes.overrides, name


def test_no_words_at_all_show_the_help() -> None:
    done = fast_ft()
    assert done.returncode == 2 and "usage: python -m fast_ft RECIPE" in done.stdout


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'generate'?" in refused(capsys, "genrate", "runs/x")
    assert "'strong' is no recipe (.yaml) and no command" in refused(capsys, "strong")
    done = fast_ft("genrate")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_unknown_option_and_a_missing_word_end_with_status_2() -> None:
    for words in (["plan"], ["data", "recipes/quickstart.yaml", "--jsn"], ["data", "r.yaml", "--show", "many"]):
        done = fast_ft(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


# Each wrong input of the list that the whole command meets


ROW = {"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "score": 4}


def with_row(**changes: Any) -> str:
    """A good row, and one with changes."""
    return json.dumps([ROW, {**ROW, "id": "b", **changes}])


WRONG_DATA = {
    "empty file": ("", "empty"),
    "truncated JSON": ('[\n {"id": "a", "conver', "line 2"),
    "row without a response": (with_row(conversations=[{"from": "human", "value": "Why?"}]), "row 2"),
    "text that is a number": (
        with_row(conversations=[{"from": "human", "value": 7}, {"from": "gpt", "value": "So."}]),
        "row 2",
    ),
    "score that is no number": (with_row(score="good"), "score"),
    "duplicate ids": (with_row(id="a"), "'a'"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
@pytest.mark.parametrize("command", ["run", "data"])
def test_wrong_rows(
    case: str, command: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, part = WRONG_DATA[case]
    (tmp_path / "rows.json").write_text(content)
    path = recipe_file({"data.train": str(tmp_path / "rows.json"), "data.test": None, "select": {}})
    message = refused(capsys, command, str(path))
    assert "rows.json" in message and part in message
    assert not (tmp_path / "runs").exists()


def test_missing_files(recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refused(capsys, "nowhere.yaml")
    assert "nowhere.json" in refused(capsys, str(recipe_file()), "data.train=./nowhere.json")
    assert "nowhere.json" in refused(capsys, str(recipe_file()), "data.test=./nowhere.json")
    assert "nowhere" in refused(capsys, str(recipe_file()), "model.name_or_path=./nowhere")
    assert not (tmp_path / "runs").exists()


def test_the_test_file_as_training_data(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe_file())
    assert "give other rows" in refused(capsys, path, f"data.test={train_file}")
    (tmp_path / "copy.json").write_text(train_file.read_text())
    assert "this is the test set" in refused(capsys, path, f"data.test={tmp_path / 'copy.json'}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("- model\n- data\n", "list"),
        ("model:\n\tname_or_path: x\n", "wrong.yaml:2:1: not valid YAML: a tab"),
        ("", "empty"),
        ("model: {name_or_path: x}\ndata: {train: y}\nlora: {rank: 8}\n", "lora.rank: unknown key"),
        ("model: {name_or_path: x}\ndata: {train: y}\ntrain: {learning_rate: fast}\n", "train.learning_rate"),
    ],
)
def test_wrong_recipes(content: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    for command in ("run", "data", "plan", "train"):
        message = refused(capsys, command, str(path))
        assert "wrong.yaml" in message and part in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong.yaml"]


def test_wrong_models(
    recipe_file: RecipeFactory, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    assert "holds no weights" in refused(capsys, str(recipe_file({"model.name_or_path": str(base)})))
    (base / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    assert "cut short" in refused(capsys, str(recipe_file({"model.name_or_path": str(base)})))
    config = json.loads((tiny / "config.json").read_text())
    (base / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    del config["num_attention_heads"]
    (base / "config.json").write_text(json.dumps(config))
    message = refused(capsys, str(recipe_file({"model.name_or_path": str(base)})))
    assert "models that name their sizes as Llama does are supported" in message
    assert not (tmp_path / "runs").exists()


def test_an_adapter_of_another_base(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.parts import save_random_llama

    base = save_random_llama(tmp_path / "base")
    path = recipe_file({"model.name_or_path": str(base), "data.test": None})
    assert main([str(path)]) == 0
    (run,) = tmp_path.glob("runs/*")
    save_random_llama(base, seed=9, layers=1)
    assert "is not what this run's adapter was trained with" in refused(
        capsys, "generate", str(run), f"data.test={POCKET}/../test.json"
    )
    RunDir.at(run).update(model=None)  # as of a run that was made before manifests held the base's fingerprint
    assert "made for another base model" in refused(capsys, "generate", str(run), f"data.test={POCKET}/../test.json")
    save_random_llama(base, seed=9)
    assert "not what was trained" in refused(capsys, "generate", str(run), f"data.test={POCKET}/../test.json")
    assert not list(run.glob("pred*"))


def test_wrong_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder" in refused(capsys, "generate", str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"recipe"')
    assert "not valid JSON" in refused(capsys, "generate", str(tmp_path))
    (tmp_path / "sweep.json").write_text("{}")
    said = refused(capsys, "report", str(tmp_path))
    assert "is a sweep's folder" in said and str(tmp_path / "best") in said


def test_python_without_docstrings_is_told_before_a_model_is_loaded(recipe_file: RecipeFactory) -> None:
    done = fast_ft(str(recipe_file()), PYTHONOPTIMIZE="2")
    assert done.returncode == 2 and "PYTHONOPTIMIZE=2" in done.stderr and "Traceback" not in done.stderr


def test_wrong_overrides(recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file())
    assert fast_ft(path, "lora.r").returncode == 2
    assert "lora.rr: unknown key" in refused(capsys, path, "lora.rr=3")
    assert "lora.r: rank 0" in refused(capsys, path, "lora.r=0")


# data, plan, runs, schema


def test_data_json_prints_json_alone(recipe_file: RecipeFactory) -> None:
    done = fast_ft("data", str(recipe_file()), "--json", "select.take=12")  # an override after an option
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content.keys() >= {"selected", "rows", "metrics", "contract", "leakage"}
    assert len(content["selected"]) == 12 and content["rows"] == {"pool": 24, "selected": 12}
    assert content["selected"][0]["stages"] == ["easy", "all"] and content["selected"][-1]["stages"] == ["all"]
    assert content["contract"]["holds"] is True and content["contract"]["checked"] == 12
    first = content["selected"][0]
    assert (
        first["prompt"].startswith("What colour is ") and first["metrics"]["score"] == 3 + int(first["id"][1:]) % 5 / 2
    )
    assert set(first["metrics"]) == set(content["metrics"])
    assert content["leakage"]["hits"] == []


def test_data_imports_no_torch(recipe_file: RecipeFactory) -> None:
    code = (
        "import sys; from fast_ft.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    for words in (["data", str(recipe_file()), "--json"], ["plan", str(recipe_file())]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_data_show_tells_trained_from_masked(recipe_file: RecipeFactory) -> None:
    done = fast_ft("data", str(recipe_file()), "--show", "2")
    assert done.returncode == 0, done.stderr
    assert "16 of 24 rows" in done.stdout and "stage easy: 8 rows" in done.stdout
    assert "checked: 16 rows. In each, the response and EOS are trained" in done.stdout
    masked, trained = (re.findall(rf"^{word} +(.*)$", done.stdout, re.M) for word in ("masked", "trained"))
    assert [text[:13] for text in masked] == ["<BOS>[INST] W"] * 2 and all(text.endswith("<EOS>") for text in trained)
    assert not any("INST" in text for text in trained), "a pipe has no colours, so each line says what it is"
    assert done.stdout.count("\nrow r") == 2 and done.stdout.count("<BOS>") == done.stdout.count("<EOS>") == 2
    assert "[INST] What colour is" in done.stdout


def test_data_list_has_a_line_for_each_selected_row(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["data", str(path := recipe_file()), "--json"]) == 0
    selected = json.loads(capsys.readouterr().out)["selected"]
    assert main(["data", str(path), "--list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"│ r\d", line)]
    assert len(lines) == len(selected) == 16
    for line, row in zip(lines, selected, strict=True):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[:2] == [row["id"], ", ".join(row["stages"])] and cells[-1] == row["prompt"]
        assert cells[2:-1] == [f"{value:g}" for value in row["metrics"].values()]
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["data", str(path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 16 + 5 and {len(line) for line in lines} == {60}, (
        "only the prompt is cut, and a row has one line"
    )
    assert all(row["id"] in line and "…" in line for line, row in zip(lines[-17:-1], selected, strict=True))


def test_data_tells_why_rows_are_left_out(recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file())
    assert main(["data", path, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["selected"][0]["id"]
    assert main(["data", path, "--why", first]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"row {first}\nprompt: ") and "taken, as one of 16 rows" in said
    assert "none of" in refused(capsys, "data", path, "--why", "r999")
    words = ["select.diversify.verb=3"]
    assert main(["data", path, "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    over = found["passed_over"][0]
    assert over["why"] == "verb" and over["like"] in [row["id"] for row in found["selected"]]
    assert main(["data", path, "--list", *words]) == 0
    said = capsys.readouterr().out
    assert "left out, but not by select.where: " in said
    assert re.search(rf"│ {over['id']} +│ verb +│ +{over['like']} │", said)
    assert main(["data", path, "--why", over["id"], *words]) == 0
    said = capsys.readouterr().out
    assert "passed over: select.diversify.verb: " in said and f"the first {over['like']}\n" in said
    words = ["model.max_length=40", "data.overlong=drop"]
    assert main(["data", path, "--json", *words]) == 0
    dropped = json.loads(capsys.readouterr().out)["passed_over"][0]
    assert (dropped["why"], dropped["like"]) == ("overlong", None)
    assert main(["data", path, "--why", dropped["id"], *words]) == 0
    assert "more tokens than model.max_length allows" in capsys.readouterr().out


def test_data_row_shows_one_row_or_the_nearest_id(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe_file())
    assert main(["data", path, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["selected"][0]["id"]
    assert main(["data", path, "--row", row]) == 0
    assert f"row {row}: " in capsys.readouterr().out
    assert "not among the 16 selected rows" in refused(capsys, "data", path, "--row", "r999")


def test_data_without_a_tokenizer_shows_the_selection(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe_file({"model.name_or_path": "nobody/such-a-model"}))
    assert main(["data", path, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["contract"]["holds"] is None and content["rows"]["selected"] == 16
    assert any("tokens were not checked" in note for note in content["notes"])
    assert main(["data", path]) == 0
    assert "tokens were not checked" in " ".join(capsys.readouterr().out.split())
    assert "HF_HUB_OFFLINE" in refused(capsys, "plan", path)


def test_plan_compares_with_the_homeworks_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(ROOT / "recipes" / "strong.yaml"), "--gpu", "t4", "select.where={}"]
    words += [f"model.tokenizer={POCKET}", f"data.train={POCKET.parent}/train.json"]
    words += [f"data.test={POCKET.parent}/test.json"]
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["budget_minutes"], content["answer_budget_minutes"]) == (240, 15)
    low, high = content["answer_minutes"]
    assert 0 < low < high
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"answers {low:g} to {high:g} minutes projected, not measured, 15 allowed" in shown
    assert "of 240 minutes projected" in shown


def test_plan_counts_steps_and_tokens(recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file())
    assert main(["plan", path, "--json"]) == 0
    easy, last = json.loads(capsys.readouterr().out)["stages"]
    assert (easy["stage"], easy["rows"], easy["steps"]) == ("easy", 8, 2)
    assert (last["stage"], last["rows"], last["steps"]) == ("all", 16, 4)
    assert last["tokens"] > easy["tokens"] > easy["supervised_tokens"] > 0
    assert main(["plan", path]) == 0
    assert "supervised tokens" in capsys.readouterr().out


def test_runs_lists_folders_and_what_differs(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fast_ft.recipe.loader import load_recipe
    from fast_ft.run.folder import RunDir
    from fast_ft.run.listing import list_runs

    path = recipe_file()
    for rank in (4, 8):
        RunDir.open(load_recipe(path, [f"lora.r={rank}"]), path).finish("train", 90.0)
    done = fast_ft("runs", str(tmp_path / "runs"), COLUMNS="200")
    assert done.returncode == 0 and "r=4" in done.stdout and done.stdout.count(" trained ") == 2
    assert "lora_alpha" not in done.stdout and "1.5 min" in done.stdout
    (tmp_path / "linked").mkdir()
    for folder in (tmp_path / "runs").iterdir():
        (tmp_path / "linked" / folder.name).symlink_to(folder)
    assert len(list_runs(tmp_path / "linked")) == 2, "a run folder may be a link"


def test_schema_is_json_schema() -> None:
    done = fast_ft("schema")
    content = json.loads(done.stdout)
    assert content["$schema"].startswith("https://json-schema.org/") and "lora" in content["properties"]


def test_a_reader_that_leaves_ends_the_command_quietly(recipe_file: RecipeFactory) -> None:
    command = f"'{sys.executable}' -m fast_ft schema | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] in ("0", "141") and "Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "goes_on"), [("train", True), ("data", False)])
def test_ctrl_c_ends_with_130_and_says_whether_the_command_goes_on(
    command: str, goes_on: bool, recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from fast_ft.data import prepare

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.dataset, "load_pool", interrupted)
    assert main([command, str(recipe_file())]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said and ("the same command goes on" in said) == goes_on


def test_a_whole_run_says_what_it_made_and_is_answered_again(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file({"curriculum": {}})
    done = killed.finished([str(path), "train.max_steps=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("runs/*")
    assert f"done: {run}" in done.stderr and (run / "pred.json").is_file()
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert main(["generate", str(run), "generate.max_new_tokens=2"]) == 0
    assert len(list(run.glob("pred*.json"))) == 2


def wrapped(cause: Exception) -> Exception:
    """What transformers makes of an error in one of its modules, which it imports late."""
    error = ModuleNotFoundError("Could not import module 'LlamaForCausalLM'. Are its requirements defined correctly?")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x/pred.json"), 2, "x/pred.json: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left on device"),
        (MemoryError(), 2, "out of the machine's memory while running this command"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 2, "`ulimit -v`"),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), 2, "out of the machine's memory"),
        (OSError("libcublas.so.12: failed to map segment from shared object"), 2, "out of the machine's memory"),
        (RuntimeError("can't start new thread"), 2, "out of the machine's memory"),
        (wrapped(ImportError("libtorch.so: failed to map segment")), 2, "out of the machine's memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "loaded here: No module named 'torch'. `pyt"),
        (ImportError("libcudart.so.12: cannot open shared object file"), 2, "libcudart.so.12: cannot open"),
        (OSError("libtorch_global_deps.so: cannot open shared object file"), 2, "libtorch_global_deps.so: cannot open"),
        (wrapped(ImportError("x.so: undefined symbol: _ZN3c10")), 2, "loaded here: x.so: undefined symbol: _ZN3c10."),
    ],
)
def test_what_the_machine_refuses_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, words: str
) -> None:
    def refused(options: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "runs", refused)
    assert main(["runs"]) == status and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        OSError("something else"),
        ModuleNotFoundError("No module named 'fast_ft.x'", name="fast_ft.x"),
        ImportError("cannot import name 'x' from 'fast_ft.data.dataset'", name="fast_ft.data.dataset"),
    ],
)
def test_other_errors_of_the_system_are_bugs(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def wrong(options: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "runs", wrong)
    with pytest.raises(type(error)):
        main(["runs"])


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the address space is Linux's")
@pytest.mark.parametrize("kib", [1_000_000, 2_600_000])
def test_too_little_address_space_is_one_sentence(recipe_file: RecipeFactory, tmp_path: Path, kib: int) -> None:
    path = recipe_file({"data.test": None})
    command = f"ulimit -v {kib}; exec '{sys.executable}' -m fast_ft '{path}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: this shell allows a process {kib:,} KiB") and "ulimit -v unlimited" in said
    assert not list(tmp_path.glob("runs/*"))


# The strong recipe on the homework's own files


@needs_real_data
@pytest.mark.parametrize("rows", ["filtered_alpaca_1k_longest", "filtered_alpaca_1k_longest.json"])
def test_strong_selects_a_hundred_long_clean_rows(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"data.train={REAL / rows}", f"data.test={REAL / 'test_set_evol_instruct_150.json'}",
        f"model.tokenizer={REAL / 'llama2_tokenizer'}", "--json",
    ]  # fmt: skip
    assert main(["data", str(ROOT / "recipes" / "strong.yaml"), *words]) == 0
    content = json.loads(capsys.readouterr().out)
    ids = [row["id"] for row in content["selected"]]
    assert len(ids) == len(set(ids)) == 100
    assert content["metrics"]["response_words"]["median"] > 200
    assert content["metrics"]["ends_cleanly"]["least"] == 1
    assert content["contract"]["holds"] is True and content["contract"]["checked"] == 100
    FIRST_IDS.setdefault("ids", ids)
    assert ids == FIRST_IDS["ids"], "both layouts give the same ids"


FIRST_IDS: dict[str, list[str]] = {}


def test_missing_data_is_said_before_a_model_is_looked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name_or_path: owner/no-such-model}\ndata: {train: data/my_rows.json}\n")
    for command in ("run", "plan", "data"):
        assert main([command, str(recipe)]) == 2
        said = capsys.readouterr().err
        assert "error: data/my_rows.json: no such file or folder" in said and "no-such-model" not in said
