"""References are found by id and by text, never under another question; and which of them a homework's rules allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common.errors import InputError
from fast_ft.data.dataset import load_prompts, load_references
from fast_ft.data.examples import Prompt
from fast_ft.data.references import References
from fast_ft.pipeline import course_references, judge_phase
from fast_ft.recipe.loader import load_recipe, with_overrides
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import POCKET, write_recipe

LEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


def rows(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def answers(prompts: str, references: References) -> dict[str, str | None]:
    return {prompt.id: references.find(prompt.id, prompt.messages) for prompt in load_prompts(prompts)[0]}


def test_references_without_ids_are_found_by_the_prompts_text(tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.json", [{"id": "x", "prompt": "Two?"}, {"id": "y", "prompt": "One  and\nmore?"}])
    given = rows(
        tmp_path / "r.json",
        [{"prompt": LEAD.format("One and more?"), "response": "1"}, {"instruction": "Two?", "output": "2"}],
    )
    assert answers(prompts, load_references(given)) == {"x": "2", "y": "1"}


def test_numbered_rows_in_another_order_do_not_pair_by_their_numbers(tmp_path: Path) -> None:
    """Neither file has ids, so both count their rows: row-1 here is row-2 there."""
    prompts = rows(tmp_path / "p.json", [{"prompt": "One?"}, {"prompt": "Two?"}])
    given = rows(tmp_path / "r.json", [{"prompt": "Two?", "response": "2"}, {"prompt": "One?", "response": "1"}])
    assert answers(prompts, load_references(given)) == {"row-1": "1", "row-2": "2"}


def test_the_id_decides_among_rows_that_ask_the_same(tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.json", [{"id": "b", "prompt": "One?"}])
    both = [{"id": "a", "prompt": "One?", "response": "1"}, {"id": "b", "prompt": "One?", "response": "one"}]
    assert answers(prompts, load_references(rows(tmp_path / "r.json", both))) == {"b": "one"}
    other = rows(tmp_path / "q.json", [{"id": "c", "prompt": "One?"}])
    with pytest.raises(InputError, match=r"different answers to the text of prompt 'c', in the rows 'a' and 'b'"):
        answers(other, load_references(str(tmp_path / "r.json")))
    both[1]["response"] = "1"
    assert answers(other, load_references(rows(tmp_path / "s.json", both))) == {"c": "1"}


def test_an_id_with_another_question_is_refused(tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.json", [{"id": "a", "prompt": "One?"}])
    given = load_references(rows(tmp_path / "r.json", [{"id": "a", "prompt": "Two?", "response": "2"}]))
    with pytest.raises(InputError, match=r"another question under the id 'a'"):
        answers(prompts, given)


def test_turns_and_languages_are_told_apart(tmp_path: Path) -> None:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    prompts = rows(tmp_path / "p.json", [{"id": "a", "messages": turns("C?", "Yes.", "And now?")}])
    given = [{"id": "1", "messages": turns("C++?", "Yes.", "And now?", "cpp")},
             {"id": "2", "messages": turns("C?", "Yes.", "And now?", "c")}]  # fmt: skip
    assert answers(prompts, load_references(rows(tmp_path / "r.json", given))) == {"a": "c"}
    assert answers(prompts, load_references(rows(tmp_path / "s.json", given[:1]))) == {"a": None}


def test_a_pred_json_is_found_by_its_questions_too(tmp_path: Path) -> None:
    prompts = rows(tmp_path / "p.json", [{"id": "a", "prompt": "One?"}])
    given = {"z": {"input": [{"role": "user", "content": "One?"}], "output": ["1"]}, "a": {"output": ["by id"]}}
    assert answers(prompts, load_references(rows(tmp_path / "r.json", given))) == {"a": "by id"}
    del given["a"]
    assert answers(prompts, load_references(rows(tmp_path / "s.json", given))) == {"a": "1"}


def test_a_run_is_judged_by_references_without_ids(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs("a", kind="reference")
    file = Path(folder.recipe().judge.references)
    given = [{"prompt": row["prompt"], "response": f"tuned {row['id']}"} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(given[::-1]))
    assert main(["judge", str(folder.root)]) == 0, capsys.readouterr().err
    assert json.loads(folder.scores.read_text())["mean"] == 1
    file.write_text(json.dumps(given[1:]))
    assert main(["judge", str(folder.root)]) == 2
    assert "no reference answer for 1 of 24 prompts, such as '0'" in capsys.readouterr().err


# ---- under the homework's rules


def under_rules(recipe: Recipe, **judge: Any) -> Recipe:
    section = recipe.judge.model_copy(update={"kind": "reference"} | judge)
    return recipe.model_copy(update={"rules": "ntu-ml-2025-hw5", "judge": section})


@pytest.fixture
def recipe(train_file: Path, tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path, POCKET, train_file, train_file, {"data.test": None}), [])


def test_references_of_test_prompts_are_refused_unless_the_course_gave_them(recipe: Recipe, tmp_path: Path) -> None:
    given = rows(tmp_path / "r.json", [{"id": "a", "prompt": "Evolve this?", "response": "So."}])
    prompts = [Prompt("a", ({"role": "user", "content": "Evolve this?"},))]
    with pytest.raises(InputError, match=r"only be rows of data.train.*'a'.*--stand-in 100.*references_from_course"):
        course_references.check(under_rules(recipe, references=given), prompts)
    course_references.check(under_rules(recipe, references=given, references_from_course=True), prompts)
    course_references.check(under_rules(recipe, references=given, kind="none"), prompts)
    course_references.check(under_rules(recipe, references=given).model_copy(update={"rules": None}), prompts)
    course_references.check(under_rules(recipe, references=None, kind="openai"), prompts)


def test_rows_of_the_training_set_with_their_own_answers_are_allowed(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stand-in.json"
    path = tmp_path / "small.yaml"
    assert main(["data", str(path), "select.take=8", "--stand-in", "5", "--output", str(file)]) == 0
    assert "data.test=" in capsys.readouterr().err
    prompts = load_prompts(str(file))[0]
    assert len(prompts) == 5
    course_references.check(under_rules(recipe, references=str(file)), prompts)
    content = json.loads(file.read_text())
    content[2]["conversations"][1]["value"] += " And more."
    with pytest.raises(InputError, match=content[2]["id"]):
        course_references.check(under_rules(recipe, references=rows(tmp_path / "other.json", content)), prompts)


def test_a_stand_in_holds_no_row_that_is_trained_on_and_no_test_prompt(
    recipe: Recipe, tmp_path: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fast_ft.data import contamination, stand_in
    from fast_ft.data.prepare import select_data

    prepared = select_data(with_overrides(recipe, ["select.take=8"]))
    drawn = stand_in.draw(prepared, 5, 1)
    texts = {contamination.text_digest(row.prompt) for row in drawn}
    assert len(texts) == 5 and not texts & {contamination.text_digest(row.prompt) for row in prepared.examples}
    assert drawn == stand_in.draw(prepared, 5, 1) != stand_in.draw(prepared, 5, 2)
    everything = len(prepared.selection.pool)
    with pytest.raises(InputError, match=rf"--stand-in {everything}: .* has \d+ rows.*Ask for fewer"):
        stand_in.draw(prepared, everything, 1)
    assert main(["data", str(tmp_path / "small.yaml"), "--stand-in", "5"]) == 2
    assert "give --output FILE too" in capsys.readouterr().err


def test_a_judges_command_refuses_before_anything_is_asked(runs: Any, serve: Any, monkeypatch: Any) -> None:
    server, folder = serve(), runs("a")
    recipe = folder.recipe().model_copy(update={"rules": "ntu-ml-2025-hw5"})
    with pytest.raises(InputError, match=r"under rules: ntu-ml-2025-hw5 references may only be rows of data.train"):
        judge_phase.judge_phase(folder, recipe, [])
    assert server.requests == 0 and not folder.scores.exists()
    own = recipe.model_copy(update={"judge": recipe.judge.model_copy(update={"references_from_course": True})})
    judge_phase.judge_phase(folder, own, [])
    assert RunDir.at(folder.root).manifest()["judged_with"]["references_from_course"] is True
