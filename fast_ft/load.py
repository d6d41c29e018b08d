"""Read a recipe: YAML with line numbers, overrides, and every problem reported at once.

Relative paths in a recipe are relative to the current directory, not to the recipe's folder: the homework's recipes
are started from the repository's root, where the homework's files lie under data/.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from fast_ft import recipe_errors
from fast_ft.errors import InputError
from fast_ft.recipe import Recipe

Key = tuple[str | int, ...]  # a place in the recipe: ("curriculum", "stages", 0, "name")
MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # counted after aliases are expanded, so that a small file cannot grow without bound
MAX_DEPTH = 20

_INT = re.compile(r"[-+]?[0-9]+")
# YAML 1.2's floats: 2e-4 is a number there; in PyYAML's YAML 1.1 it is text.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None}
for _word, _value in (("null", None), ("true", True), ("false", False)):
    _WORDS |= {_word: _value, _word.capitalize(): _value, _word.upper(): _value}
for _word in (".inf", ".Inf", ".INF", "+.inf"):
    _WORDS[_word] = float("inf")
_WORDS |= {"-.inf": float("-inf"), ".nan": float("nan"), ".NaN": float("nan"), ".NAN": float("nan")}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, put `overrides` ("lora.r=32") over it, check it, and return it frozen.

    Raises InputError that lists every problem found: key, place (file:line, or the override), value, what is
    allowed, and what to do. Warnings are not raised: `fast_ft.lint.lint(recipe)` returns them.
    """
    tree, places = read_yaml(Path(path))
    for override in overrides:
        apply_override(tree, places, override)
    return validated(tree, places, str(path))


def validated(tree: dict[str, Any], places: dict[Key, str], name: str) -> Recipe:
    """Return the Recipe that `tree` describes, or raise InputError with all problems.

    `places` says where each key stands ("strong.yaml:12"); a key without a place gets its section's, or `name`.
    """
    from fast_ft.lint import Problem, lint
    from fast_ft.rules import check_recipe

    problems: list[tuple[Key, str]] = []
    try:
        recipe = Recipe.model_validate(_tuples(tree), strict=True)
    except ValidationError as error:
        problems = recipe_errors.explain(error.errors(include_url=False), tree)
        patched = recipe_errors.without(tree, [key for key, _ in problems])
        try:  # so that what is wrong elsewhere shows at once, not on the next attempt
            recipe = Recipe.model_validate(_tuples(patched), strict=True)
        except ValidationError:
            _raise(problems, places, name)
    unsure = {".".join(map(str, key)) for key, _ in problems}
    found = [*lint(recipe)[0], *(Problem(text, (text.split(":")[0],)) for text in check_recipe(recipe))]
    for problem in found:
        # A default stands where a value was wrong: what follows from it is not the user's fault.
        if not any(
            k == bad or k.startswith(bad + ".") or bad.startswith(k + ".") for k in problem.keys for bad in unsure
        ):
            problems.append((tuple(int(p) if p.isdigit() else p for p in problem.keys[0].split(".")), problem.text))
    if problems:
        _raise(problems, places, name)
    return recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with every default written out, as plain JSON values."""
    return recipe.model_dump(mode="json")


def schema() -> dict[str, Any]:
    """Return the recipe's JSON Schema: every key, type, default and limit."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def digest(recipe: Recipe) -> str:
    """Return 64 hex digits that change with any key but output_dir: where a run is kept is no part of what it is."""
    content = {key: value for key, value in resolved(recipe).items() if key != "output_dir"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return a YAML file as plain values, and the place ("file:line") of each key. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, where a recipe (a YAML file) was expected")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}; recipes/ holds some to start from") from None
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path} has {len(raw):,} bytes; a recipe has at most {MAX_BYTES:,}: is it a data file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    node = _compose(text, str(path))
    if node is None:
        raise InputError(f"{path} is empty; a recipe needs at least model.name_or_path and data.train")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise InputError(f"{path}:{node.start_mark.line + 1}: a recipe is made of `key: value` lines, this is {kind}")
    places: dict[Key, str] = {}
    return _Plain(str(path), places).value(node, ()), places


def apply_override(tree: dict[str, Any], places: dict[Key, str], override: str) -> None:
    """Put one "dotted.key=value" into `tree`; the value is read as YAML reads it. Raises InputError."""
    dotted, equals, text = override.partition("=")
    key: Key = tuple(int(part) if part.isdigit() else part for part in dotted.strip().split("."))
    if not equals or "" in key:
        raise InputError(f"override {override!r}: write it as key=value, for example lora.r=32")
    at: Any = tree
    for depth, part in enumerate(key):
        here = ".".join(map(str, key[:depth]))
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                raise InputError(f"override {override!r}: {here} has {len(at)} entries, counted from 0; no {part!r}")
        elif isinstance(at, dict):
            part = str(part)
        else:
            raise InputError(f"override {override!r}: {here} is {recipe_errors.show(at)}, which has no keys below it")
        if depth == len(key) - 1:
            at[part] = _override_value(text, f"override {override}")
        else:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
                places.setdefault(key[: depth + 1], f"override {override}")
            at = at[part]
    places[key] = f"override {override}"


def _override_value(text: str, name: str) -> Any:
    # Only lists, mappings and quoted text need the parser. All else is one scalar, so that `>= 4` (to YAML the
    # start of a folded block), `!= 3` (a tag) and a path with " #" in it (a comment) come through as they are.
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return scalar(text)
    node = _compose(text, name)
    return None if node is None else _Plain(name, {}).value(node, ())


def scalar(text: str) -> Any:
    """Return what YAML 1.2 takes an unquoted word for: null, a truth value, a number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 100 else float(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _compose(text: str, name: str) -> yaml.Node | None:
    # BaseLoader resolves no types (that is `scalar`'s work) and makes no Python objects.
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"{place}: not valid YAML: {_yaml_remedy(error, line)}") from None
    except yaml.YAMLError as error:  # a control character
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None


def _yaml_remedy(error: yaml.MarkedYAMLError, line: str) -> str:
    problem = error.problem or "it cannot be read"
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        return "a tab; YAML is indented by spaces: replace the tab by spaces"
    if re.search(r":\s*[<>=!|@%&*`]", line):
        return f'{problem}; put a value that starts with a sign in quotes, as in score: ">= 4.5"'
    if "but found another document" in problem:
        return "a second document (---); a recipe is one"
    return f"{problem}; look for a missing space after a colon, a missing quote, or a wrong indentation"


class _Plain:
    """Turns composed nodes into plain values and notes where each key stands."""

    def __init__(self, name: str, places: dict[Key, str]) -> None:
        self.name, self.places, self.nodes = name, places, 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            raise InputError(
                f"{place}: over {MAX_NODES:,} values or {MAX_DEPTH} levels with aliases (*name) written out"
            )
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rsplit(":")[-1] not in ("str", "map", "seq"):
            raise InputError(f"{place}: the tag {node.tag!r}; a recipe takes no tags (!...): put the value in quotes")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places.setdefault((*key, i), f"{self.name}:{item.start_mark.line + 1}")
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key)
        return scalar(node.value) if node.style is None else node.value

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            word = key_node.value
            if not isinstance(word, str) or word == "<<":
                raise InputError(
                    f"{self.name}:{line}: a key is one word; lists, mappings and merges (<<) cannot be keys"
                )
            dotted = ".".join(map(str, (*key, word)))
            if word in out:
                first = self.places[(*key, word)]
                raise InputError(f"{self.name}:{line}: {dotted} stands twice, first at {first}: remove one of the two")
            self.places[(*key, word)] = f"{self.name}:{line}"
            out[word] = self.value(value_node, (*key, word))
        return out


def _tuples(value: Any) -> Any:
    # Strict checking takes no list for a tuple; a frozen recipe holds tuples.
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _raise(problems: list[tuple[Key, str]], places: dict[Key, str], name: str) -> NoReturn:
    def place(key: Key) -> str:
        for end in range(len(key), 0, -1):
            if key[:end] in places:
                return places[key[:end]]
        return name

    def order(item: str) -> tuple[bool, int]:
        match = re.match(re.escape(name) + r":(\d+): ", item)
        return (match is None, int(match[1]) if match else 0)

    lines = sorted(dict.fromkeys(f"{place(key)}: {text}" for key, text in problems), key=order)
    if len(lines) == 1:
        raise InputError(lines[0])
    raise InputError(f"{name} has {len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines))
