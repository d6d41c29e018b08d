"""The words of a command line: what is an override, what is a path, and a message for each that fits nowhere."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from fast_ft.cli import commands
from fast_ft.cli.arguments import parse
from fast_ft.cli.main import COMMANDS, main
from fast_ft.cli.parser import build_parser
from fast_ft.common.errors import InputError
from tests.helpers.parts import RecipeFactory


def read(*words: str) -> tuple[object, list[str]]:
    """(the paths, the overrides) of a command's words."""
    options = parse(build_parser()[1][words[0]], words[1:])
    return getattr(options, options.places.dest), options.overrides


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        read(*words)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_overrides_stand_anywhere(here: Path) -> None:
    expected = ("r.yaml", ["lora.r=3", "data.test=a=b", "lor.r=1"])
    assert read("data", "lora.r=3", "--json", "r.yaml", "data.test=a=b", "--show", "2", "lor.r=1") == expected
    assert read("run", "r.yaml", "lora.r=-3", "select.where.score=>= 4") == (
        "r.yaml", ["lora.r=-3", "select.where.score=>= 4"],
    )  # fmt: skip


def test_a_path_may_hold_an_equals_sign(here: Path) -> None:
    (here / "a=b").mkdir()
    (here / "lora.r=32").mkdir()
    (here / "my=recipe.yaml").touch()
    assert read("generate", "a=b", "generate.top_k=5") == ("a=b", ["generate.top_k=5"])
    assert read("generate", "runs/a=b") == ("runs/a=b", [])
    assert read("generate", "./lora.r=32", "generate.top_k=5") == ("./lora.r=32", ["generate.top_k=5"])
    assert read("generate", "lora.r=32", "generate.top_k=5") == ("lora.r=32", ["generate.top_k=5"])
    assert read("generate", "generate.top_k=5", "--", "lora.r=32") == ("lora.r=32", ["generate.top_k=5"])
    assert read("run", "my=recipe.yaml", "lora.r=32") == ("my=recipe.yaml", ["lora.r=32"])
    assert read("run", "~/x=y/r.yaml") == ("~/x=y/r.yaml", [])
    assert read("report", "a=b", "lora.r=32") == (["a=b", "lora.r=32"], [])
    assert read("submit", "a=b") == ("a=b", []) and read("runs", "a=b") == ("a=b", []) and read("runs") == ("runs", [])
    assert read("reproduce", "x=y.zip", "--train", "t=1", "--test", "u=2") == ("x=y.zip", [])


def test_an_options_value_may_hold_an_equals_sign(here: Path) -> None:
    options = parse(build_parser()[1]["data"], ["r.yaml", "--row", "lora.r=3", "--output", "a=b"])
    assert (options.row, options.output, options.overrides) == ("lora.r=3", "a=b", [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["r.yaml", "lora.r", "=", "32"], "'lora.r': a key and its value are one word, without spaces, as in lora.r="),
        (["lora.r", "=", "32", "r.yaml"], "as in lora.r=32"),
        (["r.yaml", "lora.r", "=32"], "as in lora.r=32"),
        (["r.yaml", "lora.r=", "32"], "as in lora.r=32"),
        (["r.yaml", "lora.r", "32"], "as in lora.r=32"),
        (["r.yaml", "seed", "=", "1"], "as in seed=1"),
        (["r.yaml", "lora.r"], "as in lora.r=VALUE"),
        (["r.yaml", "--lora.r", "32"], "--lora.r: a recipe's key is written without dashes, as one word: lora.r=32"),
        (["r.yaml", "--lora.r=32"], "as one word: lora.r=32"),
        (["r.yaml", "-lora.r=32"], "as one word: lora.r=32"),
        (["r.yaml", "--seed"], "as one word: seed=VALUE"),
        (["r.yaml", "--jsn"], "--jsn: this command has no such option (did you mean '--json'?)"),
        (["r.yaml", "\u2212\u2212json"], "begins with a dash that is no hyphen (U+2212): write --json"),
        (["r.yaml", "\u2014json"], "(U+2014): write --json"),
        (["\u2013h"], "(U+2013): write -h"),
        (["r.yaml", ""], "a word is empty"),
        (["r.yaml", "--output="], "--output: the value is empty"),
        (["r.yaml", "other.yaml"], "'other.yaml' is one word too many: this command takes one RECIPE"),
        (["r.yaml", "-"], "'-' is one word too many"),
        (["lora.r=3"], "RECIPE is missing; 'lora.r=3' is taken for an override, and ./lora.r=3 for a path"),
        ([], "RECIPE is missing"),
    ],
)  # fmt: skip
def test_a_word_that_fits_nowhere_gets_a_hint(words: list[str], said: str) -> None:
    assert said in refusal("data", *words)


def test_commands_that_change_no_keys_refuse_overrides() -> None:
    for command in ("submit", "report", "runs"):
        assert refusal(command, "lora.r=3").startswith("'lora.r=3': this command changes no keys; it takes ")
    assert "takes options only" in refusal("schema", "all")


def test_the_last_of_two_overrides_counts_and_the_first_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("run", "r.yaml", "lora.r=8", "seed=1", "lora.r=16") == ("r.yaml", ["seed=1", "lora.r=16"])
    assert capsys.readouterr().err == "note: lora.r=8 does not count, since lora.r=16 comes later\n"
    assert read("run", "r.yaml", "lora.r=8", "lora={r: 4}") == ("r.yaml", ["lora={r: 4}"])
    assert read("run", "r.yaml", "lora={r: 4}", "lora.r=8")[1] == ["lora={r: 4}", "lora.r=8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "data", "r.yaml"], "--json: the command or the recipe comes first, and its options behind it"),
        (["--stop-after", "3", "r.yaml"], "--stop-after: the command or the recipe comes first"),
        (["lora.r=3", "data", "r.yaml"], "data: the command comes first, and lora.r=3 behind it"),
        ([""], "'' is no recipe (.yaml) and no command"),
        (["-"], "'-' is no recipe (.yaml) and no command"),
        (["./folder/"], "folder is a folder, where a recipe (a YAML file) was expected"),
        (["./pipe.yaml"], "pipe.yaml is a pipe or a device"),
        (["/dev/null"], "/dev/null is a pipe or a device"),
    ],
)
def test_wrong_first_words(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe.yaml")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("error: ") and captured.out == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.r==32", "two signs = in a row; write it with one, lora.r=32"),
        ("train.learning_rate=1e\u22123", "it takes a number above 0; write a hyphen (-) for the minus"),
        ("train.weight_decay=\u22123", "it takes a number at least 0; write a hyphen (-) for the minus"),
        ("curriculum.stages.7.upto=1", "curriculum.stages has 2 entries, counted from 0; no 7"),
        ("curriculum.stages.-1.upto=1", "no '-1'"),
        ("curriculum.stages.\u00b2.upto=1", "no '\u00b2'"),
        (f"curriculum.stages.{'9' * 5000}.upto=1", "curriculum.stages has 2 entries"),
        ("lora.target_modules=[foo]", "lora.target_modules: 'foo' is not a layer that a LoRA can be put on"),
        ("lora.target_modules=[q_proj,v_porj]", "(did you mean 'v_proj'?)"),
        ("lora=8", "lora: 8 is not allowed; it takes a section"),
        ("lora.=8", "write it as key=value"),
        ("=8", "'=8' is one word too many"),
    ],
)
def test_wrong_overrides_make_no_folder(
    override: str, said: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file()), override]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_an_override_may_come_before_the_recipe(recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "select.take=12", str(recipe_file()), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["selected"]) == 12


LONG = "f" * 5000  # no file can have this name


@pytest.mark.parametrize("name", [LONG, "~nosuchuser/x", f"x/{LONG}"], ids=["long", "user", "long-below"])
@pytest.mark.parametrize(
    "key", ["model.name_or_path", "model.tokenizer", "data.train", "data.test", "output_dir", "backup_dir"]
)
def test_a_key_may_name_what_no_file_can_be_called(
    recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str], key: str, name: str
) -> None:
    assert main(["run", str(recipe_file()), f"{key}={name}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        [LONG], ["data", f"{LONG}.yaml"], ["chat", LONG], ["runs", LONG], ["submit", LONG], ["report", LONG],
        ["sweep", f"{LONG}.yaml"], ["reproduce", LONG, "--train", LONG, "--test", LONG], ["data", f"{LONG}=3"],
    ],
)  # fmt: skip
def test_a_word_may_be_longer_than_any_file_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("plan", ["r.yaml", "--gpu"], "--gpu: its value is missing. Write --gpu CARD: plan for this card"),
        ("run", ["r.yaml", "--stop-after"], "--stop-after: its value is missing. Write --stop-after STEPS"),
        ("run", ["r.yaml", "--stop-after", "x"], "--stop-after 'x': it takes a whole number, at least 1"),
        ("run", ["r.yaml", "--stop-after", "0"], "--stop-after '0': it takes a whole number, at least 1"),
        ("data", ["r.yaml", "--show", "-1"], "--show '-1': it takes a whole number, at least 0"),
        ("data", ["r.yaml", "--show", "9" * 5000], "it takes a whole number, at least 0"),
        ("data", ["r.yaml", "--json=3"], "--json: it takes no value: leave '3' out"),
        ("plan", ["r.yaml", "--num-processes", "0"], "--num-processes '0': it takes a whole number, at least 1"),
        ("sweep", ["r.yaml", "--hours", "two"], "--hours 'two': it takes a number"),
        ("sweep", ["r.yaml", "--r"], "--r: it may be --ray or --resume: write the whole option"),
        ("submit", ["runs/a", "--student-id"], "--student-id: its value is missing. Write --student-id ID"),
        ("reproduce", ["a.zip"], "--train DATA is missing: the training rows; --test FILE is missing: the prompts"),
        ("reproduce", ["a.zip", "--train", "t"], "--test FILE is missing: the prompts"),
        ("reproduce", [], "--train DATA is missing"),
        ("export", ["runs/a"], "--to merged|gguf|ollama|hub is missing: what to write"),
        ("export", ["runs/a", "--to", "onnx"], "--to 'onnx': it takes merged or gguf or ollama or hub"),
    ],
)
def test_an_option_without_its_value_gets_one_sentence(command: str, words: list[str], said: str) -> None:
    message = refusal(command, *words)
    assert said in message and "usage:" not in message and "argument" not in message


def test_the_top_help_names_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "--stop-after STEPS" in out and "--force-resume" in out


@pytest.mark.parametrize("override", ["select.where={scor:5}", "select={where: {score:5}}", "lora={r:8}"])
def test_a_missing_space_after_a_colon_is_named(
    override: str, recipe_file: RecipeFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(recipe_file()), override]) == 2
    assert re.search(r"'\w+:\d': put a space after the colon: \w+: \d\n", capsys.readouterr().err)


def test_every_command_that_goes_on_is_one() -> None:
    assert COMMANDS.keys() > commands.GOES_ON
