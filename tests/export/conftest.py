"""A trained run for the tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.export.export import Export
from tests.helpers.parts import write_recipe


@pytest.fixture(scope="package")
def run(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on the random Llama; its rate is high, so that the adapter counts."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, tiny, train_file, test_file, {"output_dir": str(folder / "out")})
    assert main(["train", str(recipe)]) == 0
    return folder / "out"


@pytest.fixture(scope="package")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The run's exports go into a folder of their own."""
    return Export.of(str(run), output=str(tmp_path_factory.mktemp("exports")))
