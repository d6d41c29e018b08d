"""A way of training that cannot be taken is refused first, and a run goes on by the way that it began with."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.models.loaders import unsloth
from fast_ft.pipeline import way
from fast_ft.pipeline.preview import preview
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import ADAPTER_FILES, RunDir
from fast_ft.train import checkpoints
from tests.helpers.parts import ROOT, RecipeFactory

SMI = """#!/bin/sh
echo "GPU-aa, Tesla T4, 15360 MiB, 560.35, 7.5"
"""


def t4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in nvidia-smi's place that shows a T4."""
    program = folder / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def no_network(*_: object, **__: object) -> None:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize("name", ["simple", "medium", "strong", "strong-flat"])
def test_the_homeworks_recipes_stop_first_where_there_is_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the data, which is not here either, and before anything is fetched."""
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = ROOT / "recipes" / f"{name}.yaml"
    for start in (run, lambda recipe, path: preview(recipe, path, 1)):
        with pytest.raises(InputError, match=r"'unsloth' cannot be used here: .*NVIDIA GPU.*Use model\.backend=auto"):
            start(load_recipe(path), path)


def test_what_is_not_installed_is_named(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t4(tmp_path, monkeypatch)
    path = recipe_file({"model.backend": "unsloth"})
    recipe = load_recipe(path)
    with pytest.raises(InputError, match=r"Unsloth is not installed; .*requirements-gpu\.txt.*Use model\.backend=auto"):
        way.begin(recipe, path)
    assert not (tmp_path / "runs").exists()


def test_an_import_that_fails_stops_the_run_before_a_download(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth is there, but does not import. It is tried once, whoever asks."""
    t4(tmp_path, monkeypatch)
    site = tmp_path / "site"
    (site / "unsloth").mkdir(parents=True)
    tried = site / "tried"
    (site / "unsloth" / "__init__.py").write_text(
        f"open({str(tried)!r}, 'a').write('x')\nraise RuntimeError('CUDA is too old')\n"
    )
    monkeypatch.syspath_prepend(str(site))
    unsloth._import_problem.cache_clear()
    monkeypatch.setattr(download, "_fetch", no_network)
    monkeypatch.setattr(way, "_is_here", lambda _: False)
    path = recipe_file({"model.backend": "unsloth", "model.name_or_path": "someone/base"})
    try:
        with pytest.raises(InputError, match=r"does not import \(RuntimeError: CUDA is too old\)"):
            way.begin(load_recipe(path), path)
        assert "CUDA is too old" in (unsloth.import_problem() or "")
        assert tried.read_text() == "x"
    finally:
        unsloth._import_problem.cache_clear()


def test_a_run_goes_on_by_the_way_it_began_with_or_not_at_all(recipe_file: RecipeFactory) -> None:
    path = recipe_file({"model.backend": "auto"})
    recipe = load_recipe(path)
    preview(recipe, path, 2)
    folder = RunDir.at(next((path.parent / "runs").iterdir()))
    assert checkpoints.newest(folder.checkpoints) is not None
    assert folder.manifest()["plan"]["backend"] == "peft" and folder.manifest()["start_up"]["loading"] > 0
    assert way.training_loader(folder, recipe, 1).name == "peft"
    content = json.loads(folder.plan.read_text()) | {"backend": "unsloth"}
    folder.plan.write_text(json.dumps(content))
    folder.update(plan=content)
    for size in (1, 2):
        with pytest.raises(InputError, match="began through 'unsloth' and goes on through nothing else"):
            way.training_loader(folder, recipe, size)


def test_a_finished_run_needs_no_way(recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its judge, or its report, may be wanted where there is no card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = recipe_file({"model.backend": "unsloth"})
    recipe = load_recipe(path)
    folder = RunDir.open(recipe, path)
    folder.finish("train", 1.0, backend="unsloth")
    with pytest.raises(InputError, match="'unsloth' cannot be used here"):
        way.begin(recipe, path)
    folder.finish("generate", 1.0)
    folder.adapter.mkdir()
    for left in (*(folder.adapter / name for name in ADAPTER_FILES), folder.pred):
        with pytest.raises(InputError, match="'unsloth' cannot be used here"):  # its phase is to be done again
            way.begin(recipe, path)
        left.touch()
    way.begin(recipe, path)
