"""mixing.py: several sources of training rows, each with its own take and weight."""

import json
from collections import Counter

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data import mixing
from fast_ft.data.batches import batches
from fast_ft.data.prepare import prepare, select_data
from fast_ft.data.selection import select
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Columns, Data, Select, SourceFile
from fast_ft.recipe.steps import stage_steps
from tests.helpers.parts import RecipeFactory


def write(path, rows, start=0, **names):
    keys = [names.get("prompt", "prompt"), names.get("response", "response")]
    path.write_text(
        json.dumps([dict(zip(keys, (f"{path.stem} {n + start}?", f"{n}."), strict=True)) for n in range(rows)])
    )
    return str(path)


def taken(section, **keys):
    pool = mixing.load_pool(section)
    return [example.id for example in select(pool, Select(**keys), seed=1, limit=None).examples]


def test_one_source_is_as_it_was(tmp_path):
    path = write(tmp_path / "a.json", 3)
    assert taken(Data(train=path)) == taken(Data(train=(path,))) == ["row-1", "row-2", "row-3"]
    assert mixing.digest(Data(train=path)) == mixing.load_pool(Data(train=path)).digest


def test_each_source_has_its_own_take_columns_and_name(tmp_path):
    a, b = write(tmp_path / "a.json", 5), write(tmp_path / "b.json", 4, prompt="q", response="r")
    (tmp_path / "c").mkdir()
    c = write(tmp_path / "c" / "a.json", 2, 10)
    other = SourceFile(path=b, take=1, columns=Columns(prompt="q", response="r"))
    section = Data(train=(SourceFile(path=a, take=2), other, c))
    assert taken(section) == ["a-1:row-1", "a-1:row-2", "b:row-1", "a-3:row-1", "a-3:row-2"]
    assert mixing.digest(section) == mixing.load_pool(section).digest != mixing.load_pool(Data(train=(a, c))).digest
    assert section.short_name == "a.json + b.json + a.json"


@pytest.mark.parametrize("method", ["top", "middle", "stratified", "random"])
def test_take_is_of_what_selection_takes(tmp_path, method):
    a, b = write(tmp_path / "a.json", 20), write(tmp_path / "b.json", 20)
    section = Data(train=(SourceFile(path=a, take=3), b))
    ids = taken(section, method=method, take=12)
    assert len(ids) == 12 and sum(id_.startswith("a:") for id_ in ids) <= 3
    both = Data(train=(SourceFile(path=a, take=3), SourceFile(path=b, take=4)))
    assert Counter(id_[0] for id_ in taken(both, method=method)) == {"a": 3, "b": 4}


def test_a_weight_is_how_often_an_epoch_sees_a_row():
    weights = [1.0, 2.0, 0.5, 0.5, 0.5, 0.5, 3.5]
    seen = [Counter(mixing.epoch(weights, 7, epoch)) for epoch in range(40)]
    assert all(each[0] == 1 and each[1] == 2 and each[6] == 3 for each in seen)
    assert {sum(each[row] for row in (2, 3, 4, 5)) for each in seen} == {2}, "as many in each epoch"
    assert len({tuple(sorted(each.items())) for each in seen}) > 1, "each epoch draws its part"
    assert mixing.epoch(weights, 7, 3) == mixing.epoch(weights, 7, 3) == sorted(mixing.epoch(weights, 7, 3))
    assert mixing.epoch_rows(weights) == len(mixing.epoch(weights, 7, 0)) == 8
    assert mixing.epoch_rows([0.1, 0.1]) == 1


def test_rows_of_weight_one_have_the_batches_that_they_had():
    steps = batches(5, 2, 2, shuffled=True, seed=3407, stage=0, weights=[1.0] * 5)
    assert [sorted(row for step in steps[at : at + 3] for row in step) for at in (0, 3)] == [[0, 1, 2, 3, 4]] * 2
    assert steps == batches(5, 2, 2, shuffled=True, seed=3407, stage=0)
    assert steps == [[4, 0], [1, 3], [2], [3, 4], [2, 1], [0]]
    assert batches(2, 1, 2, shuffled=False, seed=1, stage=0, weights=[1.0, 2.0]) == [[0, 1], [1]]


def test_a_recipe_of_two_sources(tmp_path, recipe_file: RecipeFactory):
    a, b = write(tmp_path / "a.json", 6), write(tmp_path / "b.json", 6)
    changes = {
        "data": {"train": [{"path": a, "weight": 2.0}, {"path": b, "take": 3}], "test": None},
        "select": {}, "curriculum": {}, "judge": {}, "train": {"effective_batch_size": 4, "warmup_steps": 0},
    }  # fmt: skip
    recipe = load_recipe(recipe_file(changes))
    prepared = select_data(recipe)
    assert prepared.staged()[0]["epoch_rows"] == 15
    (job,) = prepared.jobs
    assert len(job.batches) == 4 and Counter(row for batch in job.batches for row in batch) == Counter(
        {**dict.fromkeys(range(6), 2), **dict.fromkeys(range(6, 9), 1)}
    )
    assert stage_steps(load_recipe(recipe_file({**changes, "select": {"take": 9}}))) == [5], "at most"


def test_what_is_wrong_with_a_list_is_said(tmp_path, recipe_file: RecipeFactory):
    a = write(tmp_path / "a.json", 2)

    def said(train, **more):
        with pytest.raises(InputError) as caught:
            load_recipe(recipe_file({"data": {"train": train, "test": None}, "judge": {}, **more}))
        return str(caught.value)

    assert "data.train.1: " in said([a, a]) and "stands twice" in said([a, a])
    assert "data.train.0" in said([{"path": a, "weight": 0}])
    assert "unknown key" in said([{"path": a, "wieght": 2}])
    assert "data.train" in said([]) and "data.train.0: the text is empty" in said([" "])
    rules = said([a], rules="ntu-ml-2025-hw5")
    assert "data.train: a list is not allowed under rules: ntu-ml-2025-hw5; the homework gives one set of rows" in rules


@pytest.mark.parametrize(
    "train, weight",
    [({"num_train_epochs": 1e9, "max_steps": None}, 1.0), ({"max_steps": 3}, 1e9), ({"max_steps": 10**9}, 1e9)],
)
def test_more_rows_than_can_be_planned_for_are_refused(tmp_path, recipe_file: RecipeFactory, train, weight):
    data = {"train": [{"path": write(tmp_path / "a.json", 6), "weight": weight}], "test": None}
    changes = {"data": data, "select": {}, "curriculum": {}, "judge": {}, "train": {"warmup_steps": 0, **train}}
    with pytest.raises(InputError, match=r"stage all: its epochs, of .* rows each, see 6,000,000,000 rows in all"):
        prepare(load_recipe(recipe_file(changes)))


def test_epochs_beyond_the_last_step_are_not_drawn(tmp_path, recipe_file: RecipeFactory):
    def jobs(epochs):
        train = {"num_train_epochs": epochs, "max_steps": 4, "effective_batch_size": 4, "warmup_steps": 0}
        data = {"train": write(tmp_path / "a.json", 6), "test": None}
        changes = {"data": data, "select": {}, "curriculum": {}, "judge": {}, "train": train}
        return prepare(load_recipe(recipe_file(changes))).jobs

    assert [job.batches for job in jobs(1e12)] == [job.batches for job in jobs(2)] and len(jobs(2)[0].batches) == 4
