"""The wheel, built and installed outside of the repository: what `pip install` gives.

`make wheel-test` installs all that it depends on, too, and runs the quickstart from there: helpers/wheel_run.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.parts import ROOT
from tests.helpers.speed import child_seconds

OFFLINE = ("--no-input", "--disable-pip-version-check")  #: of pip: nothing asks the index
#: What the sources of a wheel are; the rest of the repository must not be needed.
SOURCES = ("fast_ft", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is left in the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*SOURCES, *(path.name for path in ROOT.glob("requirements*.txt"))]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        *OFFLINE,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(target),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment that has the wheel, and this environment's packages but not its paths."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", *OFFLINE, "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)],
        check=True,
    )
    return folder / "bin"


def run(bin_: Path, folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the console script in a folder that holds nothing of the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([bin_ / "fast-ft", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def test_the_wheel_holds_what_a_run_needs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = (ROOT / "fast_ft" / "doctor" / "measured.json", ROOT / "fast_ft" / "plan" / "cards.json")
    for path in [*(ROOT / "recipes").rglob("*"), *(ROOT / "fast_ft" / "pocket").rglob("*"), *data]:
        if path.is_file() and "__pycache__" not in path.parts:
            place = path.relative_to(ROOT).as_posix()
            assert (place if place.startswith("fast_ft/") else f"fast_ft/{place}") in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fast_ft", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if "__pycache__" in name or name.startswith("fast_ft/bench")]


def test_the_wheel_names_its_dependencies_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        wanted = [
            line.removeprefix("Requires-Dist: ")
            for line in archive.read(name).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    base = {line.partition(";")[0].strip() for line in wanted if "extra ==" not in line}
    assert "trl==1.14.2" in base and len(base) > 15
    extras = {line.partition("extra == ")[2].strip('"'): line for line in wanted if "extra ==" in line}
    assert extras.keys() == {"gpu", "gguf", "sweep", "ray"}
    assert any(line.startswith("unsloth==") and 'extra == "gpu"' in line for line in wanted)


def test_the_help_of_the_wheel_is_there_at_once(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "--help")
    assert done.stdout.startswith("usage: fast-ft RECIPE") and "init" in done.stdout
    assert child_seconds(lambda: run(installed, tmp_path, "--help"), 0.3) <= 0.3


def test_a_recipe_for_own_rows_is_written_and_works(installed: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "response": f"It is the number {n}, as its name says."} for n in range(20)]
    (tmp_path / "my rows.json").write_text(json.dumps(rows), encoding="utf-8")
    run(installed, tmp_path, "init", "my rows.json", "--model", "fast_ft/pocket/base", "--output", "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert 'train: "my rows.json"' in text and "template: tokenizer" in text
    done = run(installed, tmp_path, "data", "mine.yaml", "--json", "model.template=llama-2")
    assert json.loads(done.stdout)["rows"] == {"pool": 20, "selected": 20}
    before = hashlib.sha256((tmp_path / "mine.yaml").read_bytes()).digest()
    said = run(installed, tmp_path, "init", "my rows.json", "--output", "mine.yaml", status=2).stderr
    assert "mine.yaml exists, and is not written over" in said
    assert hashlib.sha256((tmp_path / "mine.yaml").read_bytes()).digest() == before
    (tmp_path / "wrong.json").write_text('[{"question": "Why?"}]', encoding="utf-8")
    said = run(installed, tmp_path, "init", "wrong.json", status=2).stderr
    assert "wrong.json, row 1" in said and not (tmp_path / "wrong.yaml").exists()


def test_make_builds_from_a_copy_without_what_other_processes_compile_meanwhile(tmp_path: Path) -> None:
    (ROOT / "fast_ft" / "__pycache__").mkdir(exist_ok=True)
    told = subprocess.run(
        ["make", "--dry-run", "wheel-test", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    copying = told[told.index("mkdir ") : told.index(f"{sys.executable} -m venv")]
    subprocess.run(["sh", "-e", "-c", copying], cwd=ROOT, env=os.environ | {"place": str(tmp_path)}, check=True)
    assert (tmp_path / "source" / "fast_ft" / "__main__.py").is_file()
    assert not list(tmp_path.rglob("__pycache__"))
