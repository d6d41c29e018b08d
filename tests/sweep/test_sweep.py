"""Sweeps over a random small Llama: the space, the validation set, the hours, caching, what is written at the end."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.data import contamination, dataset, stand_in
from fast_ft.data.examples import Example, Message
from fast_ft.data.prepare import prepare
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.loaders.peft import FusedLoader, PeftLoader
from fast_ft.pipeline.run import run
from fast_ft.pipeline.train_recorder import Recorder
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe.loader import load_recipe, resolved
from fast_ft.recipe.schema import Data, Recipe
from fast_ft.run.folder import RunDir
from fast_ft.sweep import cost_estimate, inputs, search_space, validation_set
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.cost_estimate import Measured, Work
from fast_ft.sweep.resident_model import ResidentLoader
from fast_ft.sweep.row_cache import RowCache
from fast_ft.sweep.study import Study
from fast_ft.sweep.sweep import Sweep
from fast_ft.sweep.trial_recipes import TrialRecipes
from fast_ft.sweep.trial_runner import TrialRunner
from fast_ft.sweep.trial_task import TrialResult, TrialTask
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape, lay_out
from fast_ft.train.optimizer import FlatWeights
from tests.helpers.judge_server import JudgeServer
from tests.helpers.parts import RecipeFactory, write_recipe

SEARCH = {
    "sampler": "grid", "objective": "chrf", "prompts": 10, "pruner": "none",
    "space": {"lora.r": [4, 8], "generate.max_new_tokens": [6, 9]},
}  # fmt: skip
SMALL = {"select.take": 8, "curriculum.stages": [], "train.num_train_epochs": 2, "judge.kind": "none"}


class InlineWorker:
    """One worker within this process: a real TrialRunner, without a process to start. `before` sees each task first."""

    def __init__(self, before: Any = lambda task: None) -> None:
        self.runner, self.before, self.tasks = TrialRunner(), before, []
        self._result: TrialResult | None = None

    def idle(self) -> list[int]:
        return [] if self._result else [0]

    def submit(self, worker: int, task: TrialTask) -> None:
        self.before(task)
        self.tasks.append(task)
        self._result = self.runner.run(task)

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        result, self._result = self._result, None
        return [(0, result)]

    def interrupt(self) -> None:
        self._result = None

    def close(self) -> None:
        pass


class Asleep(InlineWorker):
    """A worker from which nothing comes back."""

    def submit(self, worker: int, task: TrialTask) -> None:
        self._result = TrialResult()

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        return []


def sweep_with(pool: Any, path: Path, root: Path, hours: float | None = None) -> Sweep:
    """Run a sweep of the recipe at `path` with this pool."""
    sweep = Sweep(load_recipe(path), path, hours=hours, output=root)
    sweep.run(lambda logs: pool)
    return sweep


@pytest.fixture(scope="module")
def swept(
    tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, InlineWorker]:
    """A grid sweep of 2 x 2 points, done once: its recipe's path, its folder, its pool.

    The files that it reads are its own copies. All rows are for training or for validation, and two of the rows that
    are trained on are test prompts.
    """
    folder = tmp_path_factory.mktemp("sweep")
    base = Path(shutil.copytree(tiny, folder / "base"))
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    train, test = Path(shutil.copy(train_file, folder)), folder / "test.json"
    planted = [
        {"id": f"planted-{n}", "conversations": row["conversations"][:1]}
        for n, row in enumerate(json.loads(train.read_text(encoding="utf-8"))[4::10])
    ]
    test.write_text(json.dumps(json.loads(test_file.read_text(encoding="utf-8")) + planted), encoding="utf-8")
    path = write_recipe(folder, base, train, test, SMALL | {"select.take": 14, "search": SEARCH})
    pool = InlineWorker()
    sweep_with(pool, path, folder / "sweep")
    return path, folder / "sweep", pool


def content(root: Path) -> dict[str, Any]:
    return json.loads((root / "sweep.json").read_text(encoding="utf-8"))


def recipe_with(recipe_file: RecipeFactory, search: dict[str, Any], **changes: Any) -> Recipe:
    return load_recipe(recipe_file(SMALL | {"search": SEARCH | search} | changes))


def test_the_recipe_is_a_point_of_the_space_and_sections_change_together(recipe_file: RecipeFactory) -> None:
    values = {"lora": [{"r": 8, "lora_alpha": 16}], "train.learning_rate": {"low": 1e-4, "high": 1e-3}}
    recipe = recipe_with(recipe_file, {"space": values})
    found = search_space.read(recipe)
    assert found.own == {"lora": '{"lora_alpha": 8, "r": 4}', "train.learning_rate": 0.01}
    assert len(found.notes) == 2  # neither lies in the lists and ranges given
    trial = search_space.at(recipe, {"lora": '{"lora_alpha": 16, "r": 8}', "train.learning_rate": 5e-4}, {})
    assert (trial.lora.r, trial.lora.lora_alpha, trial.lora.lora_dropout) == (8, 16, recipe.lora.lora_dropout)
    listed = recipe_with(recipe_file, {"space": {"lora": [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 16}]}})
    assert not search_space.read(listed).notes and len(list(search_space.read(listed).grid())) == 2
    assert search_space.at(recipe, found.own, {}) == recipe.model_copy(update={"search": None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora.rank": [1]}, "search.space.lora.rank: no such key"),
        ({"data.test": ["x"]}, "search.space.data.test: the same in all trials"),
        ({"judge": [{"kind": "none"}]}, "search.space.judge: the same in all trials"),
        ({"lora.r": [8, "many"]}, 'lora.r: "many" is not allowed'),
        ({"lora.r": []}, "search.space.lora.r: the list is empty"),
        ({"lora.r": {"low": 9, "high": 8}}, "low 9 is not below high 8"),
        ({"select.method": {"low": 1, "high": 2}}, "no number: give a list of values"),
        ({"backup_dir": ["x"]}, "search.space.backup_dir: the same in all trials"),
        ({"data": [{"train": "x"}]}, "search.space.data: data.train is the same in all trials"),
        ({"train.deterministic": [True]}, "search.space.train.deterministic: the same in all trials"),
        ({"train": [{"deterministic": True}]}, "search.space.train: train.deterministic is the same in all trials"),
        ({"lora": [{"r": 8}], "lora.r": [8, 16]}, "search.space.lora.r: lora sets lora.r too"),
        ({"lora.r": [8, 16], "lora": [{"lora_alpha": 8}, {"r": 8}]}, "search.space.lora: lora.r sets lora.r too"),
        ({"curriculum.carry.optimizer": [True], "curriculum": [{"carry": {}}]}, "curriculum.carry.optimizer sets"),
        ({"lora.r": {"low": 4, "high": 8, "step": 0.5}}, "step 0.5 between whole numbers"),
    ],
)
def test_a_space_that_no_recipe_has_is_refused(
    recipe_file: RecipeFactory, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        search_space.read(recipe_with(recipe_file, {"space": values}))


def test_kinds_strata_and_patterns_can_be_axes(recipe_file: RecipeFactory) -> None:
    selection = {"select.method": "stratified", "select.strata": {"response_words": [6]}, "select.diversify.topic": 2}
    axes = {"select.diversify.topic": [1, 2, None], "select.strata.response_words": [[6], [6, 10], 3],
            "select.reject.prompt": [[], ["a b"]]}  # fmt: skip
    recipe = load_recipe(recipe_file(SMALL | {"search": SEARCH | {"space": axes}} | selection))
    found = search_space.read(recipe)
    assert found.notes == () and len(list(found.grid())) == 18
    point = {"select.diversify.topic": "1", "select.strata.response_words": "3", "select.reject.prompt": '["a b"]'}
    section = search_space.at(recipe, point, {}).select
    assert (section.diversify.topic, section.strata, section.reject.prompt) == (1, {"response_words": 3}, ("a b",))


def test_an_axis_can_be_given_on_the_command_line(recipe_file: RecipeFactory) -> None:
    path = recipe_file(SMALL | {"search": SEARCH})
    recipe = load_recipe(path, ["search.space.train.learning_rate=[1e-4, 2e-4]", "search.space.lora.r=[2]"])
    assert recipe.search is not None
    assert recipe.search.space["train.learning_rate"] == (1e-4, 2e-4) and recipe.search.space["lora.r"] == (2,)


def test_a_grid_needs_values_in_each_range(recipe_file: RecipeFactory) -> None:
    whole = search_space.read(recipe_with(recipe_file, {"space": {"lora.r": {"low": 4, "high": 16, "step": 4}}}))
    assert [point["lora.r"] for point in whole.grid()] == [4, 8, 12, 16]
    numbers = search_space.read(
        recipe_with(recipe_file, {"space": {"train.learning_rate": {"low": 1e-4, "high": 1e-3}}})
    )
    with pytest.raises(InputError, match="this range has no step"):
        list(numbers.grid())


def test_steps_are_written_exactly_and_the_recipes_own_value_is_no_second_point(recipe_file: RecipeFactory) -> None:
    values = {"generate.temperature": {"low": 0.1, "high": 0.3, "step": 0.1}}
    recipe = recipe_with(recipe_file, {"space": values}, **{"generate.temperature": 0.3, "generate.do_sample": True})
    found = search_space.read(recipe)
    assert [point["generate.temperature"] for point in found.grid()] == [0.3, 0.1, 0.2]
    drawn = search_space.at(recipe, {"generate.temperature": 0.1 + 0.1 + 0.1}, {})  # as a sampler adds up steps
    assert drawn.generate.temperature == 0.3
    between = search_space.at(recipe, {"generate.temperature": 0.25}, {})  # a recipe's own may lie between two steps
    assert between.generate.temperature == 0.25


def test_a_grid_of_more_points_than_anybody_waits_for_is_refused(recipe_file: RecipeFactory) -> None:
    values = {"low": 1e-6, "high": 1e-2, "step": 1e-6}
    path = recipe_file(SMALL | {"search": SEARCH | {"space": {"train.learning_rate": values, "lora.r": [4, 8]}}})
    with pytest.raises(InputError, match="a grid of 20,000 points, where 10,000 are the most"):
        Sweep(load_recipe(path), path, hours=None)


def test_no_end_no_judge_and_no_search_section_are_said(recipe_file: RecipeFactory) -> None:
    def make(changes: dict[str, Any]) -> None:
        path = recipe_file(SMALL | changes)
        Sweep(load_recipe(path), path, hours=None)

    with pytest.raises(InputError, match="needs a search section"):
        make({})
    with pytest.raises(InputError, match="needs an end"):
        make({"search": SEARCH | {"sampler": "tpe"}})
    with pytest.raises(InputError, match="names no judge"):
        make({"search": SEARCH | {"objective": "judge"}})


def test_rows_are_left_out_by_text_not_by_id(recipe_file: RecipeFactory, train_file: Path) -> None:
    recipe = load_recipe(recipe_file())
    pool = dataset.load_pool(recipe.data)
    prompt = pool.table["prompt"][5].as_py()
    left, count = contamination.without_excluded(pool, [contamination.text_digest(f"  {prompt.upper()} ")])
    assert count == 1 and pool.table["id"][5].as_py() not in left.table["id"].to_pylist()
    trained = prepare(load_recipe(recipe_file({"data.exclude": [contamination.text_digest(prompt)]})))
    assert prompt not in [example.prompt for example in trained.examples]


def test_validation_rows_pass_where_and_are_no_test_prompts(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path
) -> None:
    rows = json.loads(train_file.read_text(encoding="utf-8"))
    good = [row for row in rows if row["score"] >= 3.5]
    test = tmp_path / "test-of-rows.json"  # two training rows under other ids
    asked = [{"id": f"other-{i}", "conversations": row["conversations"][:1]} for i, row in enumerate(good[:2])]
    test.write_text(json.dumps(asked), encoding="utf-8")
    changes = {"data.test": str(test), "select.where": {"score": ">= 3.5"}, "select.take": 4}
    recipe = recipe_with(recipe_file, {}, **changes)
    drawn = validation_set.draw(recipe)
    assert drawn == validation_set.draw(recipe) and len({row.prompt for row in drawn}) == 10
    assert all(row.score is not None and row.score >= 3.5 for row in drawn)
    assert not {row.prompt for row in drawn} & {row["conversations"][0]["value"] for row in good[:2]}
    with pytest.raises(InputError, match="10 validation rows and 12 to train on"):
        validation_set.draw(recipe_with(recipe_file, {}, **changes | {"select.take": 12}))


def test_a_validation_row_of_several_turns_stays_whole_and_is_left_out(tmp_path: Path) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "See you."),
    ]
    messages = tuple(Message(role, text, role == "assistant") for role, text in turns)
    talk, single = Example("talk", messages, None), Example.exchange("single", "Why?", "So.")
    path = tmp_path / "validation.json"
    stand_in.write(path, [talk, single])
    prompts = dataset.load_prompts(str(path))[0]
    assert [[(each["role"], each["content"]) for each in p.messages] for p in prompts] == [
        turns[:-1],
        [("user", "Why?")],
    ]
    assert dataset.load_references(str(path)).by_id == {"talk": "See you.", "single": "So."}
    digests = contamination.digests_of(prompts)
    pool = dataset.load_pool(Data(train=str(path)))
    assert contamination.without_excluded(pool, digests)[1] == 2


def test_a_grid_gives_every_point_a_score_and_the_recipe_comes_first(swept: tuple[Path, Path, InlineWorker]) -> None:
    _, root, _ = swept
    trials = content(root)["trials"]
    assert trials[0]["point"] == {"lora.r": "4", "generate.max_new_tokens": "6"}
    assert len({json.dumps(trial["point"]) for trial in trials}) == len(trials) == 4
    for trial in trials:
        assert trial["state"] == "finished" and len(trial["scores"]) == 10
        assert trial["value"] == pytest.approx(sum(trial["scores"].values()) / 10)
    assert content(root)["ended"] == "every point of the grid was tried"


def test_no_validation_row_is_trained_on_and_rows_that_equal_test_prompts_are_reported(
    swept: tuple[Path, Path, InlineWorker], train_file: Path
) -> None:
    path, root, _ = swept
    texts = {row["id"]: row["conversations"][0]["value"] for row in json.loads(train_file.read_text(encoding="utf-8"))}
    planted = {texts["r4"], texts["r14"]}
    held = [row["conversations"][0]["value"] for row in json.loads((root / "validation.json").read_text())]
    tests = [prompt.text for prompt in dataset.load_prompts(load_recipe(path).data.test or "")[0]]
    found = content(root)
    assert len(held) == 10 and set(found["validation"]["prompts"]) == {contamination.text_digest(text) for text in held}
    assert set(found["test"]["prompts"]) == {contamination.text_digest(text) for text in tests}
    for trial in found["trials"]:
        trained = {texts[row["id"]] for row in RunDir.at(trial["folder"]).manifest()["rows"]}
        assert trained == {*texts.values()} - {*held}, "every row that is not held out, the test's among them"
        assert trained & {*tests} == planted
        assert set(trial["proof"]["rows"]) == {contamination.text_digest(text) for text in trained}
        assert set(trial["proof"]["in_test"]) == {contamination.text_digest(text) for text in planted}
        assert trial["proof"]["in_validation"] == []
    best = RunDir.at(root / "best").manifest()
    assert {(hit["example"], hit["prompt"], hit["kind"]) for hit in best["leakage"]["hits"]} == {
        ("r4", "planted-0", "exact"), ("r14", "planted-1", "exact"),
    }  # fmt: skip
    assert set(best["recipe"]["data"]["exclude"]) == set(found["validation"]["prompts"])
    assert "rows that equal test prompts: 0, 1, 2, 3;" in (root / "report.html").read_text(encoding="utf-8")


def test_a_proof_names_what_is_in_common(recipe_file: RecipeFactory) -> None:
    prepared = prepare(load_recipe(recipe_file()))
    own = [contamination.text_digest(example.prompt) for example in prepared.examples]
    proof = validation_set.proof(prepared, [own[3], "0" * 16], [own[5], own[7]])
    assert proof == {"rows": sorted(own), "in_validation": [own[3]], "in_test": sorted([own[5], own[7]])}


def test_a_trial_that_trained_on_validation_rows_ends_the_sweep(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file(SMALL | {"search": SEARCH, "select.take": 14})
    sweep = Sweep(load_recipe(path), path, hours=None, output=tmp_path / "sweep")
    recipes = sweep.begin()
    recipe = replace(recipes, validation=()).at(sweep.space.own)
    with pytest.raises(AssertionError, match="out of every selection"):
        recipes.facts(recipe, prepare(recipe))


@pytest.mark.parametrize("rules", ["ntu-ml-2025-hw5", None])
def test_the_test_set_takes_no_row_from_training(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, rules: str | None
) -> None:
    """With and without test prompts among the rows: the validation rows are the same but for those that equal one."""

    def begun(name: str, test: list[int]) -> TrialRecipes:
        rows = json.loads(train_file.read_text(encoding="utf-8"))
        asked = [{"id": f"t{i}", "conversations": rows[i]["conversations"][:1]} for i in test]
        other = {"id": "other", "conversations": [{"from": "human", "value": "Why?"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps([*asked, other]), encoding="utf-8")
        changes = {"select.take": 10, "search": SEARCH, "data.test": str(tmp_path / f"{name}.json"), "rules": rules}
        path = recipe_file(SMALL | changes)
        sweep = Sweep(load_recipe(path), path, hours=None, output=tmp_path / name)
        return sweep.begin()

    apart = begun("apart", [])
    prompts = [row["conversations"][0]["value"] for row in json.loads(train_file.read_text(encoding="utf-8"))]
    place = {contamination.text_digest(prompt): index for index, prompt in enumerate(prompts)}
    drawn = sorted(place[digest] for digest in apart.validation)
    trained = [index for index in range(24) if index not in drawn]
    shared = begun("shared", [drawn[2], *trained[:3]])
    assert len({*shared.validation} - {*apart.validation}) == 1, "one row was drawn in the place of a test prompt"
    assert not {*shared.validation} & {*shared.test}
    for recipes in (apart, shared):
        own = search_space.read(recipes.recipe).own
        recipe = recipes.at(own)
        assert set(recipe.data.exclude) == set(recipes.validation) == set(recipes.best_at(own).data.exclude)
        assert not contamination.excluded_prompts(
            recipe.data.exclude, dataset.load_prompts(recipes.recipe.data.test or "")[0]
        )
        kept = contamination.without_excluded(dataset.load_pool(recipe.data), recipe.data.exclude)[0]
        assert len(kept) == 14 and {*kept.table["prompt"].to_pylist()}.isdisjoint(
            prompt for prompt in prompts if contamination.text_digest(prompt) in recipes.validation
        )
    with pytest.raises(InputError, match="15 of these equal test prompts, which are not drawn"):
        begun("all", [*trained, drawn[0]])


def test_rows_are_excluded_by_digests_and_never_by_ids(recipe_file: RecipeFactory) -> None:
    with pytest.raises(InputError, match=r'data\.exclude\.0: "row-7" is not allowed; it takes text of the form'):
        load_recipe(recipe_file({"data.exclude": ["row-7"]}))


def test_excluded_prompts_are_named(recipe_file: RecipeFactory) -> None:
    prompts = dataset.load_prompts(load_recipe(recipe_file()).data.test or "")[0]
    assert contamination.excluded_prompts([contamination.text_digest("name  a HAT"), "0" * 16], prompts) == ["t4"]
    assert contamination.excluded_prompts([], prompts) == []


def test_a_decoding_only_change_trains_nothing_again(swept: tuple[Path, Path, InlineWorker]) -> None:
    _, root, pool = swept
    by_r: dict[str, list[dict[str, Any]]] = {}
    for trial in content(root)["trials"]:
        by_r.setdefault(trial["point"]["lora.r"], []).append(trial)
    for first, second in by_r.values():
        assert first["trained_in"] is None and second["trained_in"] == first["folder"]
        assert second["took"]["steps"] == 0 and second["work"][0] == 0
        assert _adapter(first["folder"]) == _adapter(second["folder"])
        assert RunDir.at(second["folder"]).manifest()["phases"]["train"]["training_seconds"] == 0
    assert sum(task.trained is not None for task in pool.tasks) == 3  # the two, and the best's answers


@pytest.mark.parametrize("load_best", [True, False])
def test_validation_rows_make_an_adapter_only_where_the_best_weights_are_kept(
    recipe_file: RecipeFactory, load_best: bool
) -> None:
    recipe = load_recipe(recipe_file({"data.validation": {"take": 4}, "train.load_best": load_best}))
    prepared = prepare(recipe)
    fewer = replace(prepared, held_out=prepared.held_out[:3])
    assert len(prepared.held_out) == 4
    same = inputs.training_digest(recipe, prepared) == inputs.training_digest(recipe, fewer)
    assert same is not load_best


def test_a_trial_is_what_its_recipe_gives_in_a_process_of_its_own(
    swept: tuple[Path, Path, InlineWorker], tmp_path: Path
) -> None:
    """Whatever came before it over the kept base: another r, an answer, a judge."""
    _, root, _ = swept
    for trial in content(root)["trials"]:
        folder = RunDir.at(trial["folder"])
        again = run(folder.recipe().model_copy(update={"output_dir": str(tmp_path / str(trial["number"]))}), "x.yaml")
        assert _steps(again) == _steps(folder)
        assert _adapter(again.root) == _adapter(folder.root)
        assert again.pred.read_bytes() == folder.pred.read_bytes()


@pytest.mark.parametrize("name", ["peft", "fused"])
def test_adapters_over_a_kept_base_start_as_in_a_fresh_process(
    name: str, recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First loss and gradients, to the last bit, after a training and an answer: same rank, another, back, other alpha.

    "fused" is the card's backend; on a CPU its blocks compute in plain torch, on weights that are not quantised.
    """
    import torch

    monkeypatch.setattr(
        "fast_ft.models.loaders.choose.make_loader",
        lambda model, lora, *, seed, name=name, **_: {
            "peft": PeftLoader,
            "fused": FusedLoader,
        }[name](model, lora, seed),
    )
    recipe = load_recipe(recipe_file({"model.load_in_4bit": name == "peft"}))
    prepared = prepare(recipe)
    rows = [prepared.rows[example.id] for example in prepared.examples[:3]]

    def first_step(loaded: LoadedModel) -> list[torch.Tensor]:
        loaded.model.train()
        shape = MicroBatchShape(places=3, longest=64, pad_id=0)
        passes = Passes(loaded, FlatWeights(loaded.model), TrainPlan(3, recompute_layers=1), shape)
        passes.begin(9.0, None)
        assert not loaded.notes, "the blocks are in"
        loss = passes(lay_out(rows, tokens=128, places=3, pad_id=0), seed=1)
        passes.close()
        found = [loss, *(p.grad.clone() for p in loaded.model.parameters() if p.requires_grad)]
        with torch.no_grad():
            for weight in loaded.model.parameters():
                if weight.requires_grad:
                    weight += 0.1  # as if it had been trained
        loaded.model.eval()(torch.tensor([[1, 5, 6]]))
        loaded.model.state_dict()
        return found

    kept = ResidentLoader()
    for r, alpha in ((4, 8), (4, 8), (8, 8), (8, 16), (4, 8)):
        lora = recipe.lora.model_copy(update={"r": r, "lora_alpha": alpha})
        each = recipe.model_copy(update={"lora": lora})
        ours = first_step(kept.use(each).for_training())
        fresh = choose.make_loader(each.model, lora, seed=each.seed).for_training()
        theirs = first_step(fresh)
        assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_best_yaml_is_complete_and_makes_the_best_adapter_and_answers(
    swept: tuple[Path, Path, InlineWorker], tmp_path: Path
) -> None:
    path, root, _ = swept
    written = yaml.safe_load((root / "best.yaml").read_text(encoding="utf-8"))
    recipe = load_recipe(root / "best.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert {**written, "output_dir": ""} == {**json.loads(json.dumps(resolved(recipe))), "output_dir": ""}
    assert recipe.data.test == load_recipe(path).data.test and recipe.judge == load_recipe(path).judge
    found = run(recipe, root / "best.yaml")
    best = content(root)["best"]
    assert _adapter(found.root) == _adapter(best["folder"]) == _adapter(root / "best")
    assert found.pred.read_bytes() == (root / "best" / "pred.json").read_bytes()
    assert best["value"] == max(trial["value"] for trial in content(root)["trials"])


def test_the_same_command_again_begins_nothing(swept: tuple[Path, Path, InlineWorker]) -> None:
    path, root, _ = swept
    before = content(root)["trials"]
    pool = InlineWorker()
    sweep_with(pool, path, root)
    assert content(root)["trials"] == before and not [task for task in pool.tasks if "trials" in str(task.root)]


def test_another_recipe_in_the_same_folder_is_refused(
    swept: tuple[Path, Path, InlineWorker], recipe_file: RecipeFactory
) -> None:
    _, root, _ = swept
    other = recipe_file(SMALL | {"search": SEARCH | {"prompts": 12}})
    with pytest.raises(InputError, match=r"another recipe \(.*search.prompts"):
        sweep_with(InlineWorker(), other, root)


@contextlib.contextmanager
def other(path: Path, content: bytes) -> Iterator[None]:
    """Let a file hold something else for a while."""
    was = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(was)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.json", lambda was: was.replace(b"3.5", b"3.6"), "the training rows {folder}/train.json"),
        ("test.json", lambda was: was.replace(b"Name a hat.", b"Name a cat."), "the test prompts {folder}/test.json"),
        ("sweep/validation.json", lambda was: was.replace(b"is", b"was"), "{folder}/sweep/validation.json: changed"),
        ("base/model.safetensors", lambda was: was[:-1] + bytes([was[-1] ^ 1]), "the base model {folder}/base"),
        ("base/config.json", lambda was: was + b"\n", "the base model {folder}/base"),
        ("base/tokenizer_config.json", lambda was: was + b"\n", "the tokenizer {folder}/base"),
        ("base/chat_template.jinja", lambda was: was + b"\n", "the tokenizer {folder}/base"),
    ],
)  # fmt: skip
def test_a_sweep_whose_inputs_changed_is_refused(
    swept: tuple[Path, Path, InlineWorker], name: str, change: Any, message: str
) -> None:
    path, root, _ = swept
    file = path.parent / name
    was = file.read_bytes()
    before = (root / "study.journal").read_bytes(), (root / "sweep.json").read_bytes()
    assert change(was) != was
    with other(file, change(was)), pytest.raises(InputError, match=re.escape(message.format(folder=path.parent))):
        sweep_with(InlineWorker(), path, root, hours=1.0)
    assert before == ((root / "study.journal").read_bytes(), (root / "sweep.json").read_bytes())


def test_reference_answers_are_an_input_too(recipe_file: RecipeFactory, train_file: Path, tmp_path: Path) -> None:
    references = Path(shutil.copy(train_file, tmp_path / "references.json"))
    recipe = load_recipe(recipe_file(SMALL | {"judge.kind": "reference", "judge.references": str(references)}))
    found = inputs.of_sweep(recipe, train_file)
    references.write_bytes(references.read_bytes() + b"\n")
    again = inputs.of_sweep(recipe, train_file)
    assert [name for name in found if found[name] != again[name]] == [f"the reference answers {references}"]


@pytest.mark.parametrize(
    ("early", "message"), [(False, "changed since this sweep began: the training rows"), (True, "its worker read")]
)
def test_rows_that_change_while_a_sweep_runs_end_it(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, early: bool, message: str
) -> None:
    """After the first trial; or early: before its worker read them, but after the driver did."""
    train = Path(shutil.copy(train_file, tmp_path / "rows.json"))
    changes = {"train.max_steps": 2, "data.train": str(train), "data.test": None, "search": SEARCH}
    path = recipe_file(SMALL | changes)

    class Changing(InlineWorker):
        def submit(self, worker: int, task: TrialTask) -> None:
            was = train.read_bytes()
            if early:
                train.write_bytes(was + b"\n")
            super().submit(worker, task)
            train.write_bytes(was + b"\n")

    pool = Changing()
    with pytest.raises(InputError, match=message):
        sweep_with(pool, path, tmp_path / "sweep")
    assert len(pool.tasks) == 1


def test_a_sweep_that_was_moved_or_tidied_up_goes_on(swept: tuple[Path, Path, InlineWorker], tmp_path: Path) -> None:
    path, root, _ = swept
    moved = tmp_path / "another machine" / "sweep"
    shutil.copytree(root, moved)
    shutil.rmtree(moved / "best")
    best = content(root)["best"]["number"]
    for tidied in (False, True):
        pool = InlineWorker()
        sweep_with(pool, path, moved)
        found = content(moved)
        (task,) = pool.tasks  # the best's answers: no trial is done again
        assert task.root == moved / "best"
        assert task.trained == (None if tidied else Path(found["trials"][best]["folder"]))
        assert {Path(trial["folder"]).parent for trial in found["trials"]} == {moved / "trials"}
        assert _adapter(moved / "best") == _adapter(root / "best")
        assert (moved / "best" / "pred.json").read_bytes() == (root / "best" / "pred.json").read_bytes()
        shutil.rmtree(moved / "best")
        shutil.rmtree(found["trials"][best]["folder"], ignore_errors=tidied)
    assert content(root)["trials"][best]["value"] == found["trials"][best]["value"]


def test_the_median_pruner_stops_what_is_worse_than_most_at_the_same_stage(
    recipe_file: RecipeFactory, tmp_path: Path
) -> None:
    recipe = recipe_with(recipe_file, {"pruner": "median", "space": {"lora.r": [1, 2, 3, 4, 5]}})
    assert recipe.search is not None
    study = Study(tmp_path / "study.journal", recipe.search, search_space.read(recipe), 1)
    for r, value in ((4, 0.5), (1, 0.6), (2, 0.7)):
        trial = study.ask({"lora.r": str(r)})
        assert not study.should_prune(trial, value, 1)
        study.finish(trial, value)
    trial = study.ask({"lora.r": "3"})
    assert study.should_prune(trial, 0.4, 1)
    study.prune(trial, so_far=0.4)
    assert not study.should_prune(study.ask({"lora.r": "5"}), 0.65, 1)
    assert [(r["state"], r["value"], r["stages"]) for r in study.records()][-1] == ("stopped early", None, {"1": 0.4})


def test_a_trial_is_looked_at_after_each_stage_and_may_be_stopped_there(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"name": "a", "upto": 0.5, "num_train_epochs": 1}, {"name": "b", "upto": 1.0, "num_train_epochs": 1}]
    search = SEARCH | {"pruner": "median", "stage_prompts": 10, "space": {"train.learning_rate": [0.01, 0.02]}}
    path = write_recipe(tmp_path, tiny, train_file, test_file, SMALL | {"curriculum.stages": stages, "search": search})
    monkeypatch.setattr(Study, "should_prune", lambda self, trial, value, stage: (trial.number, stage) == (1, 1))
    pool = InlineWorker()
    sweep_with(pool, path, tmp_path / "sweep")
    kept, stopped = content(tmp_path / "sweep")["trials"]
    assert [task.stop_after for task in pool.tasks] == [1, None, 1, None]  # the last one is the best's answers
    assert kept["state"] == "finished" and stopped["state"] == "stopped early" and stopped["value"] is None
    assert not (Path(stopped["folder"]) / "adapter").exists()
    folder = RunDir.at(kept["folder"])  # stopped, answered and gone on with: still what the recipe gives
    again = run(folder.recipe().model_copy(update={"output_dir": str(tmp_path / "again")}), "x.yaml")
    assert _adapter(again.root) == _adapter(folder.root)
    assert "stopped at" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")


def test_a_model_judges_in_the_driver_and_no_reply_is_asked_for_twice(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SEARCH | {"objective": "judge", "space": {"generate.max_new_tokens": [6, 9]}}
    changes = SMALL | {"judge.kind": "openai", "search": search}
    path = write_recipe(tmp_path, tiny, train_file, test_file, changes)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):  # before anything is trained
        sweep_with(InlineWorker(), path, tmp_path / "none")
    server = JudgeServer(lambda *_: "")
    with server.running() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-driver")
        sweep_with(InlineWorker(), path, tmp_path / "sweep")
        trials = content(tmp_path / "sweep")["trials"]
        assert len(trials) == 2 and all(1 <= trial["value"] <= 10 for trial in trials)
        folders = [*(Path(trial["folder"]) for trial in trials), tmp_path / "sweep" / "best"]
        preds = [json.loads((folder / "pred.json").read_text(encoding="utf-8")) for folder in folders]
        answers = {(key, entry["output"][0]) for pred in preds for key, entry in pred.items()}
        assert server.requests == len(answers) > 15  # an answer of both trials is judged once
        (Path(trials[0]["folder"]) / "scores.json").unlink()
        sweep_with(InlineWorker(), path, tmp_path / "sweep")
        assert server.requests == len(answers)
    assert not any(b"sk-of-the-driver" in f.read_bytes() for f in (tmp_path / "sweep").rglob("*") if f.is_file())


def test_hours_are_kept_and_more_of_them_go_on(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes as told: 100 s a trial. 250 s hold two of four; nothing is begun that would not fit."""
    path = write_recipe(tmp_path, tiny, train_file, test_file, SMALL | {"search": SEARCH, "data.test": None})
    clock = {"now": 0.0}
    monkeypatch.setattr("fast_ft.sweep.sweep.Clock", functools.partial(Clock, now=lambda: clock["now"]))

    def pass_time(task: TrialTask) -> None:
        if "trials" in str(task.root):
            clock["now"] += 100.0

    def slowly(self: TrialRunner, task: TrialTask) -> TrialResult:
        result = real(self, task)
        told = {"all": 100.0, "steps": 95.0, "load": 0.0}
        return replace(result, seconds=result.seconds | told) if "trials" in str(task.root) else result

    real = TrialRunner.run
    monkeypatch.setattr(TrialRunner, "run", slowly)
    sweep_with(InlineWorker(pass_time), path, tmp_path / "sweep", hours=250 / 3600)
    found = content(tmp_path / "sweep")
    assert sum(trial["state"] == "finished" for trial in found["trials"]) == 2
    assert {trial["state"] for trial in found["trials"]} == {"finished", "not begun"}
    assert found["seconds"] <= 250 * 1.05
    values = {json.dumps(t["point"]): t["value"] for t in found["trials"] if t["value"] is not None}

    clock["now"] += 5000.0  # between two commands no hours are used
    sweep_with(InlineWorker(pass_time), path, tmp_path / "sweep", hours=1.0)
    later = content(tmp_path / "sweep")
    finished = {json.dumps(t["point"]): t["value"] for t in later["trials"] if t["state"] == "finished"}
    assert len(finished) == 4 and finished.items() >= values.items()


def test_each_trial_trains_as_its_own_recipe_says_and_the_recipe_is_known_whatever_its_number(
    recipe_file: RecipeFactory, tmp_path: Path
) -> None:
    axis = "train.effective_batch_size"
    path = recipe_file(SMALL | {"data.test": None, "search": SEARCH | {"space": {axis: [4, 8]}}})

    def stopping(task: TrialTask) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_with(InlineWorker(stopping), path, tmp_path / "sweep")
    sweep_with(InlineWorker(), path, tmp_path / "sweep")
    found = content(tmp_path / "sweep")
    steps = {}
    for trial in found["trials"]:
        manifest = RunDir.at(trial["folder"]).manifest()
        steps[trial["point"][axis]] = manifest["phases"]["train"]["steps"]
        assert manifest["recipe"]["train"]["effective_batch_size"] == int(trial["point"][axis])
        assert trial["work"][0] == manifest["phases"]["train"]["tokens"], "what it was priced by"
    assert steps == {"4": 4, "8": 2}
    assert found["own"] != 0 and f">{found['own']} (" in (tmp_path / "sweep" / "report.html").read_text()
    (own,) = (trial for trial in found["trials"] if trial["number"] == found["own"])
    assert own["point"] == {axis: "4"}


def test_hours_that_hold_no_trial_miss_the_budget(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, tiny, train_file, test_file, SMALL | {"search": SEARCH})
    with pytest.raises(BudgetMissed, match="before a trial was done"):
        sweep_with(Asleep(), path, tmp_path / "sweep", hours=0.001)


def test_prices_scale_with_tokens_prompts_and_room() -> None:
    assert cost_estimate.seconds(Work(100, 10, 10), []) is None
    measured = [Measured(Work(1000, 10, 50), steps=20.0, answers=5.0, all=47.0, load=20.0),
                Measured(Work(0, 10, 50), steps=0.0, answers=8.0, all=10.0)]  # fmt: skip
    assert cost_estimate.seconds(Work(1000, 10, 50), measured) == pytest.approx(2 + 20 + 8)
    assert cost_estimate.seconds(Work(0, 0, 50), measured, loaded=False) == pytest.approx(2 + 20)
    assert cost_estimate.seconds(Work(3000, 20, 100), measured) == pytest.approx(2 + 60 + 2 * 2 * 8)


def test_a_worker_whose_first_trial_has_a_plan_looks_at_the_card_before_the_base_is_on_it(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        load_recipe(recipe_file(SMALL | {"output_dir": str(tmp_path / f"{r}"), "lora.r": r})) for r in (4, 8)
    )
    assert TrialRunner().run(TrialTask(first, "small.yaml", stop_after=1, prompts=1)).problem is None
    assert (tmp_path / "4" / "plan.json").is_file()
    runner, seen = TrialRunner(), []
    monkeypatch.setattr("fast_ft.plan.planner.card_here", lambda: seen.append(runner.kept._loaded is None))
    for recipe in (first, second):
        assert runner.run(TrialTask(recipe, "small.yaml")).problem is None
    assert seen == [True], "once, and without the base"


def test_a_trial_that_is_gone_on_with_is_priced_by_all_its_steps(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SEARCH | {"space": {"lora.r": [4]}}
    path = recipe_file(SMALL | {"data.test": None, "train.save_steps": 1, "search": search})
    add_step, stops = Recorder.add_step, [3]

    def stopping(self: Recorder, line: dict[str, Any]) -> None:
        add_step(self, line | {"seconds": 10.0})
        if stops == [line["step"]]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "add_step", stopping)
    with pytest.raises(BudgetMissed, match="before a trial was done"):
        sweep_with(InlineWorker(), path, tmp_path / "sweep")
    stops.clear()
    sweep_with(InlineWorker(), path, tmp_path / "sweep")
    (trial,) = content(tmp_path / "sweep")["trials"]
    assert trial["took"]["steps"] == 40.0 and trial["work"][0] > 0
    assert trial["seconds"]["steps"] == 20.0, "this command's alone"
    assert trial["took"]["all"] == pytest.approx(trial["seconds"]["all"] + 20.0)


def test_a_journal_cut_in_the_middle_of_a_line_is_read_and_written_again(
    recipe_file: RecipeFactory, tmp_path: Path
) -> None:
    recipe = recipe_with(recipe_file, {"sampler": "tpe"})
    assert recipe.search is not None
    journal = tmp_path / "study.journal"

    def opened() -> Study:
        assert recipe.search is not None
        return Study(journal, recipe.search, search_space.read(recipe), 1)

    study = opened()
    study.finish(study.ask({"lora.r": "4", "generate.max_new_tokens": "6"}), 0.5, folder="a")
    study.ask()
    whole = journal.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):  # wherever the kill came
        journal.write_bytes(whole[:cut])
        again = opened()
        assert [(r["value"], r["folder"]) for r in again.records()] == [(0.5, "a")]
    journal.write_bytes(whole)
    (tmp_path / "study.journal.lock").write_text("of a process that is no more")
    again = opened()
    assert len(again.interrupted()) == 1 and again.interrupted() == []
    again.finish(again.ask({"lora.r": "8", "generate.max_new_tokens": "9"}), 0.7)
    assert [r["value"] for r in opened().records()] == [0.5, 0.7]


def test_the_clock_counts_all_commands(tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_text('{"seconds": 90.0}', encoding="utf-8")
    now = 5.0
    clock = Clock(tmp_path / "clock.json", 100.0, now=lambda: now)
    assert clock.left == 10.0
    now = 6.5
    assert clock.left == 8.5
    clock.tick(now=True)
    assert Clock(tmp_path / "clock.json", None, now=lambda: now).used == 91.5


def test_the_page_asks_no_network_and_links_every_trial(swept: tuple[Path, Path, InlineWorker]) -> None:
    _, root, _ = swept
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and not re.search(r'(src|href)="(https?:)?//', page)
    links = set(re.findall(r'href="(trials/[^"]+)"', page))
    assert len(links) == 4 and all((root / link).is_file() for link in links)
    # Each plot is there for a wide window and for a phone: a line and a dot a trial, and the best so far.
    assert [page.count(part) for part in ('<path class="trial"', "<circle", "<polyline")] == [2 * 4, 2 * 4, 2]


def test_no_difference_is_said_where_noise_covers_it() -> None:
    from fast_ft.sweep.best import verdict

    best, own = {"number": 3, "value": 0.52}, {"number": 0, "value": 0.5}
    said = verdict(best, own, {"low": -0.01, "high": 0.05}, 6)
    assert said.endswith("no difference shown.")
    assert "no difference" not in verdict(best, own, {"low": 0.01, "high": 0.05}, 6)


def _adapter(root: str | Path) -> bytes:
    return (Path(root) / "adapter" / "adapter_model.safetensors").read_bytes()


def _steps(folder: RunDir) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in folder.log.read_text(encoding="utf-8").splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_rows_that_are_kept_between_trials_are_compared_with_the_prompts_each_time(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path
) -> None:
    asked = [{"id": r["id"], "conversations": r["conversations"][:1]} for r in json.loads(train_file.read_text())[4:6]]
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    rows = RowCache()
    for take in ([1.0], [0.5, 1.0]):
        stages = [{"name": f"s{i}", "upto": upto, "num_train_epochs": 1} for i, upto in enumerate(take)]
        recipe = load_recipe(recipe_file({"data.test": str(tmp_path / "asked.json"), "curriculum.stages": stages}))
        found = rows.prepared(recipe)
        assert found.leakage == prepare(recipe).leakage and found.leakage["hits"]
