"""Slots and cache are settled for the prompts at hand; the memory and the choice of products stay with the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import gpu, host_memory
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.generate.engine import product_choice
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.homework import package
from fast_ft.homework.reproduce import reproduce
from fast_ft.hub.families import FamilySpec
from fast_ft.pipeline import decoding
from fast_ft.pipeline.decode_grid import grid
from fast_ft.pipeline.rerun import generate_again, open_run
from fast_ft.pipeline.run import run
from fast_ft.pipeline.set_up import settle_plan
from fast_ft.plan import cards, plans
from fast_ft.plan.decode_pool import Answers, DecodePlan
from fast_ft.plan.plans import Machine, Wanted
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.plan.training_work import Training
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe

Made = tuple[Path, RunDir]  #: a recipe's file and its finished run
AUTO = {
    "curriculum": {}, "train.max_steps": 1, "train.warmup_steps": 0, "select.take": 8, "generate.batch_size": "auto",
    "generate.max_new_tokens": 3,
}  # fmt: skip
LLAMA = FamilySpec.from_config(policy_ntu_hw5.LLAMA_2_7B | {"max_position_embeddings": 4096})
DECODED = {"generation_batch", "cache_tokens", "dequantise", "generate_gib", "kv_cache", "settled_for"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def made(folder: RunDir) -> int:
    """The answers that were decoded side by side."""
    return int((folder.done("generate") or {})["batch_size"])


@pytest.fixture(scope="module")
def without(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that has no prompts, as those by recipes/own-data.yaml."""
    path = write_recipe(tmp_path_factory.mktemp("without"), tiny, train_file, test_file, AUTO | {"data.test": None})
    return path, run(load_recipe(path), path)


@pytest.fixture(scope="module")
def planned(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run with five prompts."""
    path = write_recipe(tmp_path_factory.mktemp("with"), tiny, train_file, test_file, AUTO)
    return path, run(load_recipe(path), path)


@pytest.fixture
def copied(planned: Made, tmp_path: Path) -> Made:
    """The run with five prompts, in a folder of the test's own."""
    shutil.copytree(planned[1].root, tmp_path / "run")
    return planned[0], RunDir.at(tmp_path / "run")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twelve prompts."""
    path = tmp_path / "many.json"
    path.write_text(json.dumps([{"id": f"m{i}", "prompt": f"What colour is the lamp {i}?"} for i in range(12)]))
    return path


def as_former(folder: RunDir, **values: Any) -> dict[str, Any]:
    """Let the run's plan be one as the program wrote it before a plan told what it was settled for."""
    plan = {"generation_batch": 1, "cache_tokens": None, "dequantise": False, "generate_gib": 0.0, "kv_cache": "16bit"}
    plan |= {key: value for key, value in read(folder.plan).items() if key != "settled_for"} | values
    folder.plan.write_text(json.dumps(plan))
    folder.update(plan=plan)
    return plan


def at_hand(folder: RunDir, *overrides: str) -> DecodePlan:
    """How `generate RUN ...` decodes."""
    recipe = open_run(folder.root, overrides)[1]
    prepared = prepare(recipe)
    return decoding.decode_plan(recipe, prepared, settle_plan(folder, recipe, prepared, "peft", None))


def slots(folder: RunDir, *overrides: str) -> int:
    return at_hand(folder, *overrides).slots


# Prompts that were not planned for


def test_a_run_without_prompts_plans_no_decoding(without: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert not DECODED & read(without[1].plan).keys()
    assert main(["plan", str(without[0]), "--gpu", "t4"]) == 0
    assert "GiB predicted in training\n" in capsys.readouterr().out
    assert slots(without[1]) == 1, "a talk in the terminal"


def test_prompts_that_come_later_are_answered_side_by_side(without: Made, many: Path, tmp_path: Path) -> None:
    """A run by recipes/own-data.yaml answered all later prompts one at a time."""
    shutil.copytree(without[1].root, tmp_path / "run")
    folder = RunDir.at(tmp_path / "run")
    for batch, wanted in (("auto", 12), ("7", 7)):
        generate_again(folder.root, [f"data.test={many}", f"generate.batch_size={batch}"])
        (facts,) = folder.manifest()["others"].values()
        assert facts["batch_size"] == wanted
    assert not DECODED & read(folder.plan).keys(), "these prompts are not the run's own"
    path = write_recipe(tmp_path, Path(folder.recipe().model.name_or_path), Path(folder.recipe().data.train), many, {
        **AUTO, "output_dir": str(folder.root)})  # fmt: skip
    assert made(run(load_recipe(path), path)) == 12
    assert read(folder.plan)["generation_batch"] == 12, "these are the run's own from now on"


def test_more_answers_to_each_prompt_get_more_slots(copied: Made) -> None:
    _, folder = copied
    before = read(folder.plan)
    assert before["generation_batch"] == made(folder) == 5
    generate_again(folder.root, ["generate.num_return_sequences=3"])
    assert made(folder) == read(folder.plan)["generation_batch"] == 15
    generate_again(folder.root, [])
    assert read(folder.plan) == folder.manifest()["plan"] == before, "the recipe's answers are decoded as they were"


def test_a_point_of_a_grid_gets_slots_of_its_own(copied: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def seen(recipe: Recipe, prepared: PreparedData, plan: RunPlan) -> DecodePlan:
        found.append(decoding.decode_plan(recipe, prepared, plan).slots)
        return decoding.decode_plan(recipe, prepared, plan)

    monkeypatch.setattr("fast_ft.pipeline.decode_grid.decode_plan", seen)
    before = read(copied[1].plan)
    grid(copied[1].root, ["num_return_sequences=1,2", "generate.do_sample=true"])
    assert found == [5, 10] and read(copied[1].plan) == before


def test_a_batch_that_was_typed_is_obeyed_and_auto_is_settled_again(copied: Made) -> None:
    _, folder = copied
    generate_again(folder.root, ["generate.batch_size=2"])
    assert made(folder) == 2 and slots(folder) == 5


# Plans of an earlier version


def test_a_plan_of_an_earlier_version_is_obeyed_for_the_runs_own_prompts(copied: Made, many: Path) -> None:
    path, folder = copied
    as_former(folder, generation_batch=2)
    pred = folder.pred.read_bytes()
    folder.reopen("generate")
    assert made(run(load_recipe(path, [f"output_dir={folder.root}"]), path)) == 2, "the run is resumed"
    assert folder.pred.read_bytes() == pred
    assert read(folder.plan)["settled_for"].startswith("5 prompts of ")
    as_former(folder, generation_batch=2)
    assert slots(folder) == 2, "the answers are made again"
    assert slots(folder, f"data.test={many}") == 12, "these prompts are others"
    assert slots(folder, "generate.num_return_sequences=2") == 10


def test_a_plan_of_an_earlier_version_is_not_obeyed_for_prompts_that_the_run_gets(without: Made, tmp_path: Path,
    many: Path) -> None:  # fmt: skip
    """The record names the new prompts by the time that they are answered."""
    shutil.copytree(without[1].root, tmp_path / "run")
    folder = RunDir.at(tmp_path / "run")
    as_former(folder, generation_batch=1)
    recipe = folder.recipe()
    path = write_recipe(tmp_path, Path(recipe.model.name_or_path), Path(recipe.data.train), many, {
        **AUTO, "output_dir": str(folder.root)})  # fmt: skip
    assert made(run(load_recipe(path), path)) == 12


def test_a_typed_batch_holds_over_a_plan_of_an_earlier_version(copied: Made) -> None:
    """It made its answers by the batch that was typed, over the cache that was planned."""
    _, folder = copied
    as_former(folder, generation_batch=5, cache_tokens=960)
    folder.update(generated_with=folder.manifest()["generated_with"] | {"batch_size": 3})
    assert slots(folder, "generate.batch_size=3") == 3
    assert at_hand(folder, "generate.batch_size=3").cache_tokens == 960
    assert slots(folder) == 5 and at_hand(folder).cache_tokens is None, "these settings are others"


def test_a_submission_of_an_earlier_version_is_reproduced_by_its_plan(
    copied: Made, tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    """Another layout of the same prompts will do: their file's digest differs."""
    _, folder = copied
    as_former(folder, generation_batch=2)
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps(read(test_file), indent=2))
    path = package.submit(folder, "b12901001", tmp_path)
    result = reproduce(path, train=str(train_file), test=str(asked), model=str(tiny), output=tmp_path / "again")
    assert made(RunDir.at(tmp_path / "again")) == 2 and result["identical"] == result["answers"] == 5


def test_a_plan_that_cannot_be_is_a_message() -> None:
    content = RunPlan(TrainPlan(8), None).to_json()
    assert not DECODED & content.keys()
    assert RunPlan.from_json(content, Path("plan.json")) == RunPlan(TrainPlan(8), None)
    with pytest.raises(InputError, match="not whole"):
        RunPlan.from_json(content | {"products": "64:"}, Path("plan.json"))
    with pytest.raises(InputError, match="it has 0 slots"):
        RunPlan.from_json(content | {"generation_batch": 0}, Path("plan.json"))


# Memory


def settled_7b(memory_gib: float, prompts: list[int]) -> RunPlan:
    """The plan of a 7B on an H200 with this memory."""
    training = Training(16, "adamw_8bit", load_in_4bit=True, backend="fused", rows=8, longest=200)
    machine = Machine(memory_gib, cards.card("h200").expected, tiles=False)
    return plans.settle(LLAMA.shape, training, [[200] * 8] * 4, Answers(prompts, 1024), Wanted(), machine)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, recipe_file: RecipeFactory) -> Any:
    """How decoding is planned for a 7B and 100 prompts of 120 tokens, on a card with this much memory in GiB."""
    small = load_recipe(recipe_file(AUTO))
    recipe = small.model_copy(
        update={
            "model": small.model.model_copy(update={"load_in_4bit": True}),
            "generate": small.generate.model_copy(update={"max_new_tokens": 1024}),
        }
    )
    prepared = replace(prepare(small), prompt_ids=[[1] + [i + 2] * 119 for i in range(100)])
    monkeypatch.setattr(decoding, "_family", lambda recipe: LLAMA)
    monkeypatch.setattr(gpu, "capability", lambda: (9, 0))
    monkeypatch.setattr(host_memory, "own_bytes", lambda: 2**39)

    def settled(whole_gib: float | None, plan: RunPlan, **budget: Any) -> DecodePlan:
        monkeypatch.setattr(gpu, "whole_gpu_gib", lambda: whole_gib)
        given = recipe.model_copy(update={"budget": recipe.budget.model_copy(update=budget)})
        named = decoding.named(given, prepared, plan)
        return decoding.decode_plan(given, prepared, named)

    return settled


def test_prompts_that_come_later_get_the_memory_that_the_run_was_planned_for(on_a_card: Any) -> None:
    unplanned = settled_7b(139.0, [])
    assert unplanned.decode is None
    large = on_a_card(139.8, unplanned)
    assert large.slots == 100 and large.dequantise and large.cache_tokens > 100_000
    small = on_a_card(139.8, replace(unplanned, train=replace(unplanned.train, memory_gib=14.3)))
    assert 20 < small.slots < 100 and small.cache_tokens < 20_000 and small.gib < 14.3
    assert on_a_card(139.8, unplanned, memory_gib=14.3) == small, "a budget of memory is taken as it is now"
    assert on_a_card(None, unplanned).slots == 64, "on a CPU with memory enough, no more than it gains by"


def test_a_pool_that_the_card_here_has_no_room_for_is_settled_again(on_a_card: Any) -> None:
    """An H200's pool went down by eighths on a T4, each time with a set-up of its own."""
    planned = settled_7b(139.0, [120] * 100)
    assert planned.decode is not None and planned.decode.dequantise
    assert on_a_card(139.8, planned).cache_tokens == planned.decode.cache_tokens, "here it is obeyed"
    small = on_a_card(14.6, planned)
    assert not small.dequantise and 1 < small.slots < 100 and small.gib < 14.6


# Products


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let there be two ways to multiply, as on a card; the numbers of rows that were timed."""
    rows: list[int] = []

    def faster(model: FusedModel, count: int, way: str) -> str:
        rows.append(count)
        return product_choice.DEQUANTISED if len(rows) % 2 else way

    monkeypatch.setattr(FusedModel, "way_name", property(lambda self: "nf4_mma"))
    monkeypatch.setattr(product_choice, "_faster", faster)
    return rows


def test_later_answers_add_to_the_products_and_change_none(copied: Made, many: Path, timed: list[int]) -> None:
    """The base model's answers, another prompt and other prompts each replaced what the run's own were made with."""
    _, folder = copied
    recipe = folder.manifest()["recipe"]
    folder.update(recipe=recipe | {"judge": recipe["judge"] | {"base_prompts": 2}})
    generate_again(folder.root, [])
    own = read(folder.plan)["products"]
    assert own.startswith("5:") and " 2:" in own and folder.manifest()["plan"]["products"] == own
    before, asked = read(folder.plan), len(timed)
    assert main(["generate", str(folder.root), "--prompt", "Why?"]) == 0
    assert read(folder.plan) == before, "--prompt leaves the run as it is"
    generate_again(folder.root, [f"data.test={many}"])
    more = dict(part.split(":") for part in read(folder.plan)["products"].split())
    assert more.items() > dict(part.split(":") for part in own.split()).items() and "12" in more
    asked = len(timed)
    generate_again(folder.root, [])
    assert len(timed) == asked, "all of them are planned, and nothing is timed"
    assert read(folder.plan)["settled_for"] == before["settled_for"]


def test_an_engine_for_fewer_rows_obeys_what_was_chosen_for_more(timed: list[int]) -> None:
    """After out of memory the next engine timed again the numbers of rows that the plan had by then."""
    model: Any = type("Model", (), {"way_name": "nf4_mma", "dequantised_at": frozenset()})()
    first = product_choice.choose(model, [64, 48, 32, 16], "")
    assert first == "64:dequantised 48:nf4_mma 32:nf4_mma 16:nf4_mma" and timed == [64, 48]
    assert product_choice.choose(model, [56, 48, 32], first) == first.replace(" 48", " 56:dequantised 48")
    assert timed == [64, 48, 56] and model.dequantised_at == {56}
    product_choice.choose(model, [20, 16], first)
    assert timed == [64, 48, 56], "what is faster for 32 rows is faster for 20"
