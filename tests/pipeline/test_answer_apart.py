"""Answers to prompts of the moment, which leave the run as it is; and a grid's scores, in a run that has references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import answered, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path, test_file: Path) -> Path:
    """A run with scores and with the base model's answers."""
    place = tmp_path_factory.mktemp("apart")
    references = place / "references.json"
    references.write_text(answered(test_file, "The hat."))
    judge = {"kind": "reference", "references": str(references), "base_prompts": 2}
    recipe = write_recipe(place, tiny, train_file, test_file, {"curriculum": {}, "judge": judge})
    return run(load_recipe(recipe, ["train.max_steps=2"]), recipe).root


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the run but the lock's own."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_one_prompt_is_answered_on_the_screen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(folder)
    own = json.loads((folder / "pred.json").read_text())["t4"]
    assert own["input"][0]["content"] == "Name a hat."
    assert main(["generate", str(folder), "--prompt", "Name a hat."]) == 0
    assert capsys.readouterr().out == own["output"][0] + "\n", "the run's adapter answers as it did in the run"
    assert content(folder) == before


def test_prompts_are_answered_into_a_file_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, asked, output = content(folder), tmp_path / "asked.json", tmp_path / "new" / "answers.json"
    asked.write_text(json.dumps([{"id": "a", "prompt": "Why?"}, {"id": "b", "prompt": "A bell?"}]))
    base_prompts: list[int] = []
    monkeypatch.setattr(
        "fast_ft.pipeline.generate_phase.base_answers",
        lambda ready, recipe, *_: (base_prompts.append(recipe.judge.base_prompts), []),
    )
    words = [
        "generate",
        str(folder),
        "--prompts",
        str(asked),
        "--output",
        str(output),
        "generate.num_return_sequences=2",
    ]
    assert main(words) == 0
    answers = json.loads(output.read_text())
    assert list(answers) == ["a", "b"] and all(len(entry["output"]) == 2 for entry in answers.values())
    assert answers["a"]["input"] == [{"role": "user", "content": "Why?"}]
    assert content(folder) == before and f"done: {output}" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "Why?", "--output", str(output)]) == 0
    assert list(json.loads(output.read_text())) == ["prompt"]
    assert base_prompts == [0, 0], "the base model answers nothing, though the recipe lets it answer two prompts"


def test_wrong_words_are_refused_before_a_model_is_loaded(
    folder: Path, test_file: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("fast_ft.pipeline.generate_phase.load", None)
    command, prompts, output = (
        ("generate", str(folder)),
        ("--prompts", str(test_file)),
        ("--output", str(tmp_path / "a")),
    )
    assert "Give --output FILE too" in refused(capsys, *command, *prompts)
    assert "give one of them" in refused(capsys, *command, *prompts, "--prompt", "Why?")
    assert "give one of them" in refused(capsys, *command, "--grid", "--prompt", "Why?", "temperature=1")
    assert "give --prompts FILE" in refused(capsys, *command, *output)
    assert "give --prompts FILE" in refused(capsys, *command, *output, "--grid", "temperature=1")
    assert "name the prompts already" in refused(capsys, *command, *prompts, *output, f"data.test={test_file}")
    assert "the text is empty" in refused(capsys, *command, "--prompt", "  ")
    assert "that is a folder" in refused(capsys, *command, *prompts, "--output", str(tmp_path))
    assert "own files" in refused(capsys, *command, *prompts, "--output", str(folder / "pred.json"))
    for read in (test_file, train_file):
        assert "not written over" in refused(capsys, *command, *prompts, "--output", str(read))
    assert "--prompt: " in (said := refused(capsys, *command, "--prompt", "hat " * 300)) and "256" in said
    assert "no such" in refused(capsys, *command, "--prompts", str(tmp_path / "none.json"), *output).lower()


def test_a_grid_shows_the_scores_of_each_point(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json.loads((folder / "scores.json").read_text())
    assert main(["generate", str(folder), "--grid", "max_new_tokens=2,6"]) == 0
    short, same = capsys.readouterr().out.splitlines()
    summary = json.loads((folder / "grid" / "grid.json").read_text())
    assert [summary[1][key] for key in ("exact_match", "rouge_l", "chrf")] == [
        round(own[key], 4) for key in ("exact_match", "rouge_l", "chrf")
    ], "this point has the recipe's own settings"
    assert same.endswith(f"exact {own['exact_match']:.0%}  ROUGE-L {own['rouge_l']:.2f}") and "ROUGE-L" in short
    scores = json.loads((folder / "grid" / "scores-max_new_tokens2.json").read_text())
    assert len(scores["prompts"]) == 5 and "base" not in scores
    assert json.loads((folder / "scores.json").read_text()) == own


def test_a_grid_over_prompts_without_references_says_why_it_has_no_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (asked := tmp_path / "asked.json").write_text(json.dumps([{"id": "other", "prompt": "Why not?"}]))
    assert main(["generate", str(folder), "--grid", "max_new_tokens=2", f"data.test={asked}"]) == 0
    said = capsys.readouterr()
    assert "ROUGE-L" not in said.out and "these answers get no scores: judge.references" in said.err


def test_a_comparison_writes_over_no_file_but_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, notes = tmp_path / "one", tmp_path / "two", tmp_path / "notes.txt"
    for copy in (one, two):
        shutil.copytree(folder, copy)
    notes.write_text("mine")
    for other in (notes, one / "manifest.json"):
        content = other.read_bytes()
        assert "is not written over" in refused(capsys, "report", str(one), str(two), "--output", str(other))
        assert other.read_bytes() == content
    assert "one run's page is report.html" in refused(capsys, "report", str(one), "--output", str(tmp_path / "page"))
    for _ in range(2):
        assert main(["report", str(one), str(two), "--output", str(tmp_path / "page")]) == 0


def test_answers_write_over_no_file_but_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "notes.json"
    other.write_text(json.dumps([{"prompt": "mine"}]))
    said = refused(capsys, "generate", str(folder), "--prompt", "Why?", "--output", str(other))
    assert "is not written over" in said and json.loads(other.read_text()) == [{"prompt": "mine"}]
