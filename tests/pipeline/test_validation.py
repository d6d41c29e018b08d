"""Validation rows: kept out of training by text, measured without a trace, and the best weights survive a stop."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.common.atomic_files import sha256_file
from fast_ft.common.errors import InputError
from fast_ft.data.folding import fold
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.homework import checks
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from fast_ft.train import state
from fast_ft.train.forward_backward import Passes
from tests.helpers.parts import RecipeFactory
from tests.pipeline.test_walk import Stop, disk

#: Six steps of two stages, measured after every second one.
MEASURED = {
    "data.test": None, "select.take": 12, "train.learning_rate": 0.05, "train.effective_batch_size": 3,
    "train.per_device_train_batch_size": 3,
    "train.warmup_steps": 0, "train.eval_steps": 2, "train.save_steps": 3,
}  # fmt: skip


def lines(folder: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text(encoding="utf-8").splitlines()]


def weights(folder: RunDir) -> str:
    return sha256_file(folder.adapter / "adapter_model.safetensors")


def others(train_file: Path, path: Path, count: int = 6) -> str:
    """The last rows of the training file as a file of their own, written in another way."""
    rows = json.loads(train_file.read_text(encoding="utf-8"))[-count:]
    for row in rows:
        for turn in row["conversations"]:
            turn["value"] = turn["value"].upper() + "  "
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def texts(examples: list[Any]) -> set[tuple[str, str]]:
    return {(fold(each.prompt), fold(each.response)) for each in examples}


@pytest.mark.parametrize("by_file", [True, False])
def test_validation_rows_are_kept_out_by_text(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, by_file: bool
) -> None:
    given = others(train_file, tmp_path / "held.json") if by_file else {"take": 6}
    recipe = load_recipe(recipe_file({"data.validation": given, "select": {}, "data.test": None}))
    prepared = prepare(recipe)
    assert len(prepared.held_out) == len(prepared.validation) == 6
    assert len(prepared.examples) == 18 and not texts(prepared.examples) & texts(prepared.held_out)
    assert any(text.startswith("6 validation rows; 6 rows of their texts") for text in prepared.notes)
    assert prepare(recipe).held_out == prepared.held_out, "the seed draws them"
    assert isinstance(prepared, PreparedData) and prepared.staged()[-1]["ids"] == [
        e.id for e in prepared.stages[-1].examples
    ]


def test_what_is_wrong_with_validation_rows_is_said(recipe_file: RecipeFactory, test_file: Path) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(InputError) as caught:
            prepare(load_recipe(recipe_file(changes)))
        return str(caught.value)

    assert "neither take nor path" in said(**{"data.validation": {}})
    assert "is the test set" in said(**{"data.validation": str(test_file)})
    assert "25 rows are asked for, where" in said(**{"data.validation": {"take": 25}})
    assert "no row is left to train on" in said(**{"data.validation": {"take": 24}})
    rows = json.loads(test_file.read_text(encoding="utf-8"))[:2]
    for row, value in zip(rows, ("long " * 200, "short"), strict=True):
        row["conversations"] = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": value}]
    held = test_file.with_name("held.json")
    held.write_text(json.dumps(rows[:1]), encoding="utf-8")
    dropping = {"data.validation": str(held), "data.test": None, "data.overlong": "drop"}
    assert said(**dropping).startswith("data.validation: all its rows were dropped, and none is left to measure")
    assert said(**dropping | {"data.overlong": "error"}).startswith("validation rows cannot be measured as they are")
    held.write_text(json.dumps(rows), encoding="utf-8")
    notes = prepare(load_recipe(recipe_file(dropping))).notes
    assert "1 validation row over model.max_length 128 was dropped" in notes
    with pytest.raises(InputError, match=r"train.load_best: not used, since data.validation names no rows"):
        load_recipe(recipe_file(), ["train.load_best=true"])


def test_measuring_leaves_no_trace_in_the_adapter(recipe_file: RecipeFactory, train_file: Path, tmp_path: Path) -> None:
    """The same rows are trained on in both runs; dropout and noise draw the same numbers."""
    held = others(train_file, tmp_path / "held.json")
    kept = json.loads(train_file.read_text(encoding="utf-8"))[:-6]
    (tmp_path / "kept.json").write_text(json.dumps(kept), encoding="utf-8")
    changes = {**MEASURED, "train.neftune_noise_alpha": 5.0, "lora.lora_dropout": 0.1,
               "data.train": str(tmp_path / "kept.json")}  # fmt: skip
    without = {key: value for key, value in changes.items() if key != "train.eval_steps"}
    plain = run(load_recipe(recipe_file(without, name="plain.yaml")), "plain.yaml", until="adapter")
    measured = run(load_recipe(recipe_file({**changes, "data.validation": held})), "small.yaml", until="adapter")
    assert weights(plain) == weights(measured)
    steps = {line["step"]: line["validation_loss"] for line in lines(measured) if "validation_loss" in line}
    assert sorted(steps) == [2, 4, 6] and len(lines(measured)) == 6 and steps[2] != steps[6]
    assert all("validation_loss" not in line for line in lines(plain))
    assert [each.id for each in measured.record().validation] == [f"r{n}" for n in range(18, 24)]


def test_the_loss_is_that_of_the_saved_adapter(recipe_file: RecipeFactory) -> None:
    """The last measurement is what transformers and PEFT give for the adapter that was written."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(recipe_file({**MEASURED, "data.validation": {"take": 5}, "model.load_in_4bit": False}))
    folder = run(recipe, "small.yaml", until="adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder.adapter)).eval()
    total, count = 0.0, 0
    for row in prepare(recipe).validation:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        total, count = total + loss * row.supervised, count + row.supervised
    assert lines(folder)[-1]["validation_loss"] == pytest.approx(total / count, abs=1e-4)


def test_the_best_weights_are_the_adapter_and_survive_a_stop_at_any_write(
    recipe_file: RecipeFactory, tmp_path: Path
) -> None:
    changes = {**MEASURED, "train.learning_rate": 3.0, "train.lr_scheduler_type": "constant",
               "data.validation": {"take": 8}, "train.load_best": True}  # fmt: skip

    def start(name: str) -> RunDir:
        path = recipe_file({**changes, "output_dir": str(tmp_path / name)})
        return run(load_recipe(path), path, until="adapter")

    with disk() as whole:
        straight = start("straight")
    measured = {line["step"]: line["validation_loss"] for line in lines(straight) if "validation_loss" in line}
    step = min(measured, key=lambda each: measured[each])
    assert step != max(measured), "else this test shows nothing: choose another learning rate"
    facts = straight.record().phase("train")
    assert (facts.best_step, facts.best_validation_loss) == (step, measured[step])
    assert any("the adapter is that of this step" in text for text in straight.record().notes)
    last = run(
        load_recipe(recipe_file({**changes, "train.load_best": False, "output_dir": str(tmp_path / "last")})),
        "small.yaml", until="adapter",
    )  # fmt: skip
    assert weights(last) != weights(straight)
    for stop in range(whole.count // 4, whole.count, whole.count // 5):
        try:
            with disk(stop):
                start(f"stopped-{stop}")
        except Stop:
            pass
        again = start(f"stopped-{stop}")
        assert weights(again) == weights(straight), stop
        assert again.record().phase("train").best_step == step


def test_weights_that_could_not_be_kept_are_not_the_best_ones(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls with each measurement; memory for keeping the weights is short at the last one, then at all."""
    changes = {**MEASURED, "data.validation": {"take": 8}, "train.load_best": True}
    kept = state.save_weights
    for short, best in (({6}, 4), ({2, 4, 6}, 0)):
        path = recipe_file({**changes, "output_dir": str(tmp_path / f"kept-{best}")})
        steps = iter((2, 4, 6))

        def save(folder: Path, model: Any, short: set[int] = short, steps: Iterator[int] = steps) -> None:
            if next(steps) in short:
                raise MemoryError
            kept(folder, model)

        monkeypatch.setattr(state, "save_weights", save)
        folder = run(load_recipe(path), path, until="adapter")
        measured = [line["validation_loss"] for line in lines(folder) if "validation_loss" in line]
        assert measured == sorted(measured, reverse=True) and next(steps, None) is None, "else this shows nothing"
        notes = folder.record().notes
        assert folder.record().phase("train").best_step == best
        assert any("weights after step 6, of the least validation loss so far, were not kept" in text for text in notes)
        wanted = f"after step {best} of 6; the adapter" if best else "so the adapter is that of the last step"
        assert any(wanted in text for text in notes)
        assert "Training goes on" in capsys.readouterr().err
        assert not list(folder.checkpoints.glob("best-6*"))


def test_a_validation_row_without_room_costs_the_figure_and_not_the_run(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("of a test")

    monkeypatch.setattr(Passes, "measure", full)
    path = recipe_file({**MEASURED, "data.validation": {"take": 8}, "train.load_best": True})
    folder = run(load_recipe(path), path, until="adapter")
    assert (folder.adapter / "adapter_model.safetensors").is_file() and len(lines(folder)) == 6
    notes = folder.record().notes
    assert any(text.startswith("the validation loss is not measured from step 2 on") for text in notes)
    assert any("so the adapter is that of the last step" in text for text in notes)


def test_under_rules_validation_rows_choose_nothing(recipe_file: RecipeFactory) -> None:
    ruled = load_recipe("recipes/strong.yaml", ["data.validation={take: 50}"])
    assert ruled.data.held_out is not None and ruled.data.held_out.take == 50
    with pytest.raises(InputError, match=r"train.load_best: true is not allowed under rules"):
        load_recipe("recipes/strong.yaml", ["data.validation={take: 50}", "train.load_best=true"])
    recipe = load_recipe(recipe_file({**MEASURED, "data.validation": {"take": 8}}))
    folder = run(recipe, "small.yaml", until="adapter")
    said = [each for each in checks.by_manifest(recipe, folder.record()) if each.rule == "validation-rows"]
    assert "12 rows were trained on; 8 more were validation rows, which gave no gradient" in said[0].text
    assert "ask the TAs" in said[0].text and said[0].passed is None
