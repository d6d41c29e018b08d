"""new_recipe.py: what `init` writes can be run as it is."""

from pathlib import Path

import pytest

from fast_ft.cli.new_recipe import write_recipe
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import prepare
from fast_ft.hub.families import context_length
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import POCKET


@pytest.mark.parametrize("named", ["fast_ft/pocket/base", str(POCKET)])
def test_a_recipe_for_a_short_context_is_written_and_can_be_prepared(
    named: str, train_file: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where fast_ft/pocket/base means what came with the program
    path = write_recipe(str(train_file), "mine.yaml", model=named, test=str(test_file))
    recipe = load_recipe(path)
    assert recipe.model.max_length == context_length(named) == 512 and recipe.generate.max_new_tokens == 256
    assert len(prepare(load_recipe(path, ["model.template=llama-2"])).prompt_ids) == 5


def test_the_context_of_a_shipped_model_is_known_in_any_folder(
    train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(str(train_file), "mine.yaml", model="fast_ft/pocket/base")
    with pytest.raises(InputError, match="the model's context has 512"):
        load_recipe(path, ["model.max_length=2048"])


@pytest.mark.parametrize("name", ["none.json", "./rows/none.jsonl"])
def test_rows_that_are_nowhere_are_said_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        write_recipe(name, None)
    assert not list(tmp_path.iterdir())
    assert write_recipe("someone/rows", None).is_file(), "a hub id is looked for when the recipe runs"
