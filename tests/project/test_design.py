"""docs/design.md describes the program that is there: every folder in its order, and no file that is gone.

Comments and docstrings are held to the same: a file that they name by its folder exists.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.parts import ROOT
from tests.test_imports import PACKAGE, ROOMS

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
_SUFFIX = r"\.(?:py|cu|json|md|yaml)"
#: A file with a folder of the repository, or of fast_ft/, in front of it.
_FOLDERS = "|".join([*ROOMS, "pocket", "fast_ft", "bench", "tools", "tests"])
NAMED = re.compile(rf"(?<![\w./{{}}-])(?:{_FOLDERS})/[\w./-]+?\.(?:py|cu)(?!\w)")
#: Where texts stand that may name such files, and from where they name them.
TEXTS = {
    "documents": [ROOT / "README.md", *(ROOT / "docs").glob("*.md")],
    "settings": [
        ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "mkdocs.yml",
        *ROOT.glob("requirements*.txt"), *(ROOT / "recipes").glob("*.yaml"),
    ],
    **{folder: [*(ROOT / folder).rglob("*.py")] for folder in ("fast_ft", "bench", "tools", "tests")},
    "kernels": [*PACKAGE.rglob("*.cu")],
}  # fmt: skip
FROM = (PACKAGE, ROOT, ROOT / "tests")
#: A module that is named without its folder, the modules that there are, and two of other projects'.
BARE = re.compile(r"(?<![\w./{}<-])[a-z]\w*\.py(?!\w)")
FILES = {path.name for paths in TEXTS.values() for path in paths} | {"generation.py", "convert_hf_to_gguf.py"}


def sections() -> dict[str, str]:
    """The page's sections by their headings; what stands above the first has the heading ""."""
    first, *others = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    return {"": first, **dict(zip(others[::2], others[1::2], strict=True))}


def test_every_folder_has_its_section_in_the_order_of_imports() -> None:
    headings = [name for heading in sections() for name in heading.split(", ")]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert [name for name in headings if name in rooms] == [*ROOMS, "pocket"]
    assert rooms == {*ROOMS, "pocket"}


@pytest.mark.parametrize("heading", sections())
def test_every_file_that_the_design_names_exists(heading: str) -> None:
    """A file is named from the folder that its section is about, from fast_ft/, or from the repository's root."""
    folders = [*(PACKAGE / name for name in heading.split(", ")), PACKAGE, ROOT]
    named = re.findall(rf"`([\w./]+{_SUFFIX})`", sections()[heading])
    others = {"config.json", "generation_config.json"}  # a base model's
    missing = [name for name in named if name not in others and not any((each / name).is_file() for each in folders)]
    assert missing == []


def gone(text: str) -> list[str]:
    """The files of the project that a text names and that are not there."""
    return [name for name in NAMED.findall(text) if not any((folder / name).is_file() for folder in FROM)]


@pytest.mark.parametrize("kind", TEXTS)
def test_every_file_that_a_comment_or_a_document_names_exists(kind: str) -> None:
    found = {path.name: gone(path.read_text(encoding="utf-8")) for path in TEXTS[kind] if path != Path(__file__)}
    assert found and {name: missing for name, missing in found.items() if missing} == {}


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "tests"])  # whose data name modules of their own
def test_every_module_that_is_named_without_its_folder_exists(kind: str) -> None:
    found = {path.name: {*BARE.findall(path.read_text(encoding="utf-8"))} - FILES for path in TEXTS[kind]}
    assert found and {name: missing for name, missing in found.items() if missing} == {}


def test_a_file_that_is_gone_is_found() -> None:
    assert gone("see train/loss.py, train/gone.py and (bench/never.py); not of ../train/other.py") == [
        "train/gone.py", "bench/never.py",
    ]  # fmt: skip
    assert {*BARE.findall("session.py calls absent.py, as torch/optim/adamw.py does")} - FILES == {"absent.py"}


def members(path: Path) -> Iterator[str]:
    """The classes and functions of a module, and the methods of its classes as Class.method."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield f"{path.stem}.{node.name}"
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef):
                    yield f"{node.name}.{part.name}"


def test_every_function_that_design_and_performance_name_exists() -> None:
    """`loss.response_loss` is a module's function, `Passes.measure` a class's; a recipe's keys have a section first."""
    known = {name for path in PACKAGE.rglob("*.py") for name in members(path)}
    firsts = {name.split(".")[0] for name in known}
    for page in ("design.md", "performance.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        named = re.findall(rf"[`(](?!\S+{_SUFFIX})((\w+)\.\w+)(?=[`)(])", text)
        assert [name for name, first in named if first in firsts and name not in known] == [], page
