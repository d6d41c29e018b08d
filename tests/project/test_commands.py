"""The commands that documents name: each is described in docs/commands.md, and takes the options that it is given."""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.__main__ import __doc__ as BENCH
from fast_ft.cli.main import COMMANDS
from fast_ft.cli.parser import USAGES, build_parser
from fast_ft.recipe.reference import reference_page
from tests.helpers.parts import ROOT
from tests.project.test_links import DOCUMENTS, text_of
from tools import commands_page

PARSERS = build_parser()[1]
each_document = pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in DOCUMENTS])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
#: Commands that a document gives as a line of its own, or in `...`; a line that ends with \ goes on.
LINE = re.compile(r"(?:^ +!?|`!?|&& )(python -m [^\n`#&]+)", re.MULTILINE)


def lines(path: Path) -> Iterator[str]:
    """The commands that a document gives."""
    for match in LINE.finditer(re.sub(r" \\\n *", " ", text_of(path))):
        yield match[1].strip()


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_the_page_of_commands_is_what_help_says() -> None:
    assert set(USAGES) == set(COMMANDS)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").rstrip("\n")
    assert page == commands_page.page(), "write it again: python -m tools.commands_page > docs/commands.md"


def unknown(line: str) -> list[str]:
    """What is wrong with a command of a document: a module or options that are not there."""
    name, *words = line.split()[2:]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if name == "fast_ft":
        return sorted(given - options(PARSERS[words[0] if words and words[0] in PARSERS else "run"]))
    text = source(name)
    if text is None:
        return [name]
    return sorted(option for option in given if f'"{option}"' not in text)


def source(name: str) -> str | None:
    """The text of a module that is a command of the project's; None: there is none. Another program's is empty."""
    if name.split(".")[0] not in ("bench", "tools", "tests"):
        return ""
    place = ROOT / name.replace(".", "/")
    files = [path for path in (place / "__main__.py", place.with_suffix(".py")) if path.is_file()]
    return files[0].read_text(encoding="utf-8") if files else None


def lacking(line: str) -> list[str]:
    """The options that a command of a document does not give, and that must be given."""
    name, *words = line.split()[2:]
    if name == "fast_ft":
        actions = PARSERS[words[0] if words and words[0] in PARSERS else "run"]._actions
        needed = {action.option_strings[-1] for action in actions if action.required and action.option_strings}
    else:
        needed = {*re.findall(r'"(--[\w-]+)"(?:[^()]|\([^()]*\))*?required=True', source(name) or "")}
    return sorted(needed - {*words})


@each_document
def test_every_option_that_a_document_gives_exists(path: Path) -> None:
    assert {line: found for line in lines(path) if (found := unknown(line))} == {}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in DOCUMENTS if path.name != "commands.md"])
def test_a_command_in_a_block_has_the_options_that_it_must_have(path: Path) -> None:
    blocks = re.findall(r"^    +!?(python -m [^\n#&]+)", re.sub(r" \\\n *", " ", text_of(path)), re.MULTILINE)
    assert {line: found for line in blocks if (found := lacking(line))} == {}


def test_an_option_and_a_module_that_are_gone_are_found() -> None:
    assert unknown("python -m fast_ft data RECIPE --show 3 --shwo") == ["--shwo"]
    assert unknown("python -m fast_ft RECIPE --explore") == ["--explore"]
    assert unknown("python -m bench.gone --results FILE") == ["bench.gone"]
    assert unknown("python -m bench --adopt FILE --never") == ["--never"]
    assert lacking("python -m fast_ft reproduce ZIP --test FILE") == ["--train"]
    assert lacking("python -m bench.decode --base DIR") == ["--prompts"]


@each_document
def test_every_key_of_a_recipe_that_a_document_names_exists(path: Path) -> None:
    """Keys are written as section.key; a figure's name and a file's look alike, and are known by theirs."""
    figures = json.loads((ROOT / "bench" / "results" / "figures.json").read_text(encoding="utf-8"))
    keys = set(re.findall(r"^##+ `([\w.]+)`", reference_page(), re.MULTILINE))
    sections = "|".join(key for key in keys if "." not in key)
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[\w.]+\b)(?![(*])", text_of(path)))
    others = {*figures, "generate.key", "judge.key"}  # the last two stand for any key of the section
    assert {
        name for name in named - others if re.sub(r"\.\d+", "", name) not in keys and not name.endswith(".md")
    } == set()


def test_every_measurement_is_named_where_the_bench_begins_and_answers_help() -> None:
    """A module of the bench that its docstring calls a command; those that take a JOB are parts of others."""
    assert BENCH is not None
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")}
    says = {name: ast.get_docstring(ast.parse(text)) or "" for name, text in texts.items()}
    commands = {name for name in says if re.search(rf"python -m bench\.{name}\b(?! JOB)", says[name])}
    assert len(commands) > 20
    assert {name for name in commands if f"bench.{name}" not in BENCH} == set()
    assert {name for name in commands if "ArgumentParser" not in texts[name]} == set(), "no --help"


def targets() -> set[str]:
    """The Makefile's targets that people name; the others are steps of these."""
    phony = re.search(r"^\.PHONY: (.+)", MAKEFILE, re.MULTILINE)
    assert phony is not None
    return {*phony[1].split()} - {"compiled", "interpreter"}


def test_every_make_target_is_described_and_every_one_that_a_document_names_exists() -> None:
    header = MAKEFILE[: MAKEFILE.index("\n\n")]
    assert {*re.findall(r"make ([a-z-]+)", header)} == targets()
    for path in DOCUMENTS:
        assert {*re.findall(r"(?:`|^    |&& )make ([a-z-]+)", text_of(path), re.MULTILINE)} <= targets()
