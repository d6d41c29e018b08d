"""README, docs/ and the notebook: links lead somewhere, commands exist, and the project's address is one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from fast_ft.cli.main import COMMANDS
from tests.helpers.parts import ROOT

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), NOTEBOOK]
each_document = pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in DOCUMENTS])


def text_of(path: Path) -> str:
    """The document's Markdown; of a notebook its text cells."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path, text: str) -> list[str]:
    """The relative links and pictures of a text that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path, text_of(path)) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/none.md) [b](docs/data.md#none) [c](docs/data.md#layouts) `[d](x.md)` ![e](docs/report.png)"
    assert broken(ROOT / "README.md", text) == ["docs/none.md", "docs/data.md#none"]


def test_every_page_is_named_in_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", text_of(ROOT / "README.md")))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


@each_document
def test_every_command_and_recipe_that_is_named_exists(path: Path) -> None:
    for word in re.findall(r"python -m fast_ft ([\w./-]+)", text_of(path)):
        assert word in COMMANDS or word == "my-recipe.yaml" or (ROOT / word).is_file(), word
    for recipe in re.findall(r"(?:bench/)?recipes/[\w-]+\.yaml", text_of(path)):
        assert (ROOT / recipe).is_file(), recipe


def test_the_projects_address_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    readme, notebook = text_of(ROOT / "README.md"), NOTEBOOK.read_text(encoding="utf-8")
    page = text_of(ROOT / "docs" / "t4.md")
    owner, name = address.removeprefix("https://github.com/").split("/")
    badge = f"(https://colab.research.google.com/github/{owner}/{name}/blob/main/notebooks/colab.ipynb)"
    assert readme.count(badge) == 1 and notebook.count(badge) == 1
    assert re.findall(r"git clone (\S+fast_ft)", readme) == [address]
    assert f'REPOSITORY = \\"{address}\\"' in notebook
    assert f"{address}/issues/new" in page and f"git clone {address}\n" in page
    assert f"{address}/blob/main/docs/t4.md" in notebook, "the last cell leads to the page"
    everywhere = re.findall(r"github\.com/([\w-]+)/fast_ft", readme + notebook + page)
    assert set(everywhere) == {owner}


def test_the_readme_is_read_to_the_end() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 200
    assert lines[lines.index("    make quickstart") + 1] == "    source .venv/bin/activate"
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000
