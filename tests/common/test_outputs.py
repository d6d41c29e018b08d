"""outputs.py: a file that a user names for the output of `data` takes no other file's place."""

import errno
import os
import resource
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.common import atomic_files
from tests.helpers.parts import RecipeFactory


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("view", [["--explore"], ["--stand-in", "3"]])
def test_data_writes_over_no_file_but_its_own(
    recipe_file: RecipeFactory,
    train_file: Path,
    test_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    view: list[str],
) -> None:
    recipe = recipe_file({"select.take": 8})
    command = ("data", str(recipe), *view, "--output")
    for other in (recipe, train_file, test_file):
        content = other.read_bytes()
        said = refused(capsys, *command, str(other))
        assert str(other) in said and "is not written over. Name another file" in said
        assert other.read_bytes() == content
    assert "that is a folder" in refused(capsys, *command, str(tmp_path))
    assert "a pipe or a device" in refused(capsys, *command, "/dev/null") and not Path("/dev/null").is_file()
    output = tmp_path / "new"
    for _ in range(2):
        assert main([*command, str(output)]) == 0
        assert output.is_file()


def test_a_limit_on_files_is_named(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, former[1]))
    try:
        said = refused(capsys, "data", str(recipe_file()), "--explore", "--output", str(tmp_path / "map.html"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert "file too large" in said and "Raise the limit that `ulimit -f` shows" in said
    assert not (tmp_path / "map.html").exists()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.ESTALE, errno.ENOTCONN])
def test_what_a_file_system_refuses_is_a_message(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:  # fmt: skip
    def refuse(what: str, path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(atomic_files, "before", refuse)
    said = refused(capsys, "data", str(recipe_file()), "--explore", "--output", str(tmp_path / "map.html"))
    assert f"map.html: {os.strerror(number).lower()}" in said and not (tmp_path / "map.html").exists()


def test_data_shows_one_thing_and_writes_the_file_that_is_named(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = ("data", str(recipe_file())), ("--output", str(tmp_path / "new"))
    assert "--output: it is the file of --explore" in refused(capsys, *command, *output)
    assert "--output: it is the file of --explore" in refused(capsys, *command, "--list", *output)
    said = refused(capsys, *command, "--stand-in", "3", "--json", *output)
    assert "--json and --stand-in: data shows one of them at a time" in said
    assert not (tmp_path / "new").exists()
