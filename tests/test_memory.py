"""Out of memory outside training (test_train.py has that): smaller pieces, or what to change; nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeFactory

from fast_ft import adapter_file, backend, generate, selfcheck
from fast_ft.errors import InputError
from fast_ft.load import load_recipe
from fast_ft.memory import explained
from fast_ft.pipeline import run
from fast_ft.rundir import RunDir


class Full:
    """Raise an out-of-memory error at the chosen calls of a function, counted from 1; else call it."""

    def __init__(self, function: Any, calls: set[int], error: type[BaseException] = torch.OutOfMemoryError) -> None:
        self.function, self.calls, self.error, self.count = function, calls, error, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise self.error("of a test")
        return self.function(*arguments, **options)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *arguments, **options: self(instance, *arguments, **options)


@pytest.mark.parametrize("call", ["for_training", "for_generation"])
def test_out_of_memory_while_loading_says_what_to_change(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = recipe_file()
    with monkeypatch.context() as patch:
        patch.setattr(backend.PeftBackend, call, Full(getattr(backend.PeftBackend, call), {1}))
        with pytest.raises(InputError, match=r"out of the card's memory while loading .*load_in_4bit.*nvidia-smi"):
            run(load_recipe(path), path)
    assert run(load_recipe(path), path).pred.is_file(), "the same command again"


def test_out_of_memory_while_saving_loses_no_step(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = recipe_file({"output_dir": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(adapter_file, "save", Full(adapter_file.save, {1}, MemoryError))
        with pytest.raises(InputError, match=r"out of the machine's memory while saving the adapter. Nothing is lost"):
            run(load_recipe(path), path)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert len(before.splitlines()) == 6 and not (tmp_path / "run" / "adapter").exists()
    folder = run(load_recipe(path), path)
    assert (folder.root / "log.jsonl").read_bytes() == before, "no step was taken again"


def test_out_of_memory_while_answering_goes_on_with_a_smaller_pool(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({"generate.batch_size": 4})
    monkeypatch.setattr(generate, "make_pool", Full(generate.make_pool, {1}))
    folder = run(load_recipe(path), path)
    assert len(json.loads(folder.pred.read_text())) == 5 and (folder.done("generate") or {})["batch_size"] == 2
    assert any("out of memory in batches of 4: went on with 2" in text for text in folder.manifest()["notes"])


def test_out_of_memory_with_one_answer_says_what_to_change_and_keeps_the_adapter(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({"generate.batch_size": 1})
    monkeypatch.setattr(generate, "make_pool", Full(generate.make_pool, {1}))
    with pytest.raises(InputError, match=r"one prompt at a time. Lower generate.max_new_tokens"):
        run(load_recipe(path), path)
    (root,) = (path.parent / "runs").iterdir()
    assert RunDir.at(root).done("train") is not None


def test_out_of_memory_while_checking_the_adapter_says_what_to_change(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file()
    monkeypatch.setattr(selfcheck, "verify", Full(selfcheck.verify, {1}))
    with pytest.raises(InputError, match=r"while checking the adapter. Lower generate"):
        run(load_recipe(path), path)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explained("x", "y"):
        raise RuntimeError("a bug")
