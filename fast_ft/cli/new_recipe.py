"""`python -m fast_ft init`: recipes/own-data.yaml with the user's paths in place of its lines marked CHANGE."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.data import dataset, sources
from fast_ft.hub.families import LLAMA_2, context_length
from fast_ft.recipe.loader import validated
from fast_ft.recipe.schema import Data
from fast_ft.recipe.yaml_source import parse

EXAMPLE = "recipes/own-data.yaml"
_PLAIN = re.compile(r"[\w./~+-]*[A-Za-z/][\w./~+-]*")  #: text that YAML reads as itself, without quotes


def write_recipe(rows: str | None, output: str | None, *, model: str | None = None, test: str | None = None) -> Path:
    """Write a recipe for the rows in `rows` and return its path; without rows, one whose lines are still to be changed.

    Args:
        rows: what data.train may be: a file, a folder or a hub id. A local one is read first.
        output: the recipe's path; None: the rows' name with .yaml, in the current folder.
        model: what model.name_or_path may be; None: the example's LLaMA2-7B.
        test: what data.test may be.

    Raises:
        InputError: rows or prompts cannot be read, or there is such a file already.
    """
    path = Path(output or f"{Path(rows).name.split('.')[0] if rows else 'my-recipe'}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {path}: a recipe's name ends with .yaml")
    if path.exists():
        raise InputError(f"{path} exists, and is not written over. Name another file: --output FILE.yaml")
    text = expanded(EXAMPLE).read_text(encoding="utf-8")
    for key, value in (("train", rows), ("test", test), ("name_or_path", model)):
        if value is not None:
            text = _filled(text, key, value)
    if model is not None:
        text = _filled(text, "template", "llama-2" if LLAMA_2.search(model) else "tokenizer")
        text = _within_context(text, model)
    validated(parse(text, str(path)), {}, str(path))
    for name in filter(None, (rows, test)):
        sources.check_named(name)
    if rows is not None and expanded(rows).exists():
        dataset.load_pool(Data(train=rows))
    if test is not None and expanded(test).exists():
        dataset.load_prompts(test)
    atomic_files.write_text(path, text)
    return path


def _within_context(text: str, model: str) -> str:
    """Return a recipe's text with lengths that a model's context holds, where its folder or its name tells that."""
    context = context_length(model) or sys.maxsize
    example = parse(text, EXAMPLE)
    if example["model"]["max_length"] > context:
        text = _filled(text, "max_length", str(context))
    if example["generate"]["max_new_tokens"] >= context:
        text = _filled(text, "max_new_tokens", str(context // 2))
    return text


def _filled(text: str, key: str, value: str) -> str:
    """Return a recipe's text with another value for `key`, the comment behind it kept but for the word CHANGE."""
    written = value if _PLAIN.fullmatch(value) or value.isdecimal() else json.dumps(value, ensure_ascii=False)
    line = re.compile(rf"^( +{key}: )(\S+)( *)(?:# (?:CHANGE(?:: )?)?(.*))?$", re.MULTILINE)
    assert len(line.findall(text)) == 1, f"{EXAMPLE} has one line for {key}"

    def filled(match: re.Match[str]) -> str:
        """Keep the comment in its column where there is room."""
        before, former, spaces, comment = match.groups()
        gap = " " * max(3, len(former) + len(spaces) - len(written))
        return before + written + (f"{gap}# {comment}" if comment else "")

    return line.sub(filled, text)
