"""YAML as a recipe needs it: YAML 1.2's numbers, the line of every key, no tags, no duplicate keys, bounded size."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from fast_ft.common.errors import InputError

Key = tuple[str | int, ...]  # a place in the recipe: ("curriculum", "stages", 0, "name")
MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # counted after aliases are expanded, so that a small file cannot grow without bound
MAX_DEPTH = 20

_INT = re.compile(r"[-+]?[0-9]+")
# YAML 1.2's floats: 2e-4 is a number there; in PyYAML's YAML 1.1 it is text.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# Characters that look like a space or like nothing, and are none to YAML: copied from a web page or a chat.
_UNSEEN = re.compile("[\u00a0\u1680\u2000-\u200f\u202f\u205f\u2060\u3000\ufeff]")
_CURLED = "\u2018\u2019\u201a\u201c\u201d\u201e"  # quotes as word processors write them
_WORDS: dict[str, Any] = {"": None, "~": None}
for _word, _value in (("null", None), ("true", True), ("false", False)):
    _WORDS |= {_word: _value, _word.capitalize(): _value, _word.upper(): _value}
for _word in (".inf", ".Inf", ".INF", "+.inf"):
    _WORDS[_word] = float("inf")
_WORDS |= {"-.inf": float("-inf"), ".nan": float("nan"), ".NaN": float("nan"), ".NAN": float("nan")}


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return a YAML file as plain values, and the place ("file:line") of each key. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, where a recipe (a YAML file) was expected")
    if path.exists() and not path.is_file():  # a pipe could block for ever, and a run reads the recipe again
        raise InputError(f"{path} is a pipe or a device, where a recipe (a YAML file) was expected: save it as a file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}; recipes/ holds some to start from") from None
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path} has {len(raw):,} bytes; a recipe has at most {MAX_BYTES:,}: is it a data file?")
    node = _compose(_decoded(raw, path), str(path))
    if node is None:
        raise InputError(f"{path} is empty; a recipe needs at least model.name_or_path and data.train")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise InputError(f"{path}:{node.start_mark.line + 1}: a recipe is made of `key: value` lines, this is {kind}")
    places: dict[Key, str] = {}
    return _Plain(str(path), places).value(node, ()), places


def _decoded(raw: bytes, path: Path) -> str:
    """Return a recipe's text. Raises InputError where it is not UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw[:64].count(0) * 4 >= max(1, len(raw[:64])):
        raise InputError(f"{path} is not UTF-8 text but UTF-16, as some editors write it: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def parse(text: str, name: str) -> Any:
    """Return the value of one piece of YAML; `name` stands for it in messages. Raises InputError."""
    node = _compose(text, name)
    return None if node is None else _Plain(name, {}).value(node, ())


def check_text(text: str, place: str) -> None:
    """Raise InputError for characters that no file can be named by or written with: NUL, halves of surrogate pairs."""
    if bad := re.search("[\x00\ud800-\udfff]", text):
        raise InputError(f"{place}: character number {bad.start() + 1} of the text (code {ord(bad[0])}) is no text")


def scalar(text: str) -> Any:
    """Return what an unquoted word is in YAML 1.2: null, a truth value, a number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 100 else float(text)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Bounded(yaml.BaseLoader):
    """Composes nodes while they are few and flat. It makes no objects and resolves no types, which `scalar` does.

    PyYAML alone works for seconds on a megabyte of short lines, and its recursion ends only after a thousand levels.
    """

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node and what is in it. Raises RecursionError where there are too many, or too deep."""
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH + 2 or self.nodes > 3 * MAX_NODES:  # `_Plain` counts exactly, and names the line
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Bounded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines = text.splitlines()[: mark.line + 1] if mark else []
        line, before = (lines[-1] if lines else "", lines[-2] if lines[1:] else "")
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"{place}: not valid YAML: {_yaml_remedy(error, line, before)}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{name}:{number}: not valid YAML: a control character (code {error.character}): take it out"
        ) from None
    except RecursionError:
        raise InputError(f"{name}: over {MAX_NODES:,} values, or nested deeper than {MAX_DEPTH} levels") from None


def _yaml_remedy(error: yaml.MarkedYAMLError, line: str, before: str) -> str:
    problem = error.problem or "it cannot be read"
    for each, where in ((line, "this line"), (before, "the line before")):
        if found := _UNSEEN.search(each):
            return f"{problem}; {where} holds {_unseen(found[0])}"
    if "mapping values" in problem and (found := re.match(r"\s*([\w.]+):\S", before)):
        return f"the line before has no space behind its colon: write {found[1]}: and a space"
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        return "a tab; YAML is indented by spaces: replace the tab by spaces"
    if re.search(r":\s*[<>=!|@%&*`]", line):
        return f'{problem}; put a value that starts with a sign in quotes, as in score: ">= 4.5"'
    if "escape" in problem:
        return (
            f"{problem}; a backslash in double quotes begins an escape: write / in a path, or single quotes around it"
        )
    if "but found another document" in problem:
        return "a second document (---); a recipe is one"
    return f"{problem}; look for a missing space after a colon, a missing quote, or a wrong indentation"


def _unseen(character: str) -> str:
    name = unicodedata.name(character, "a character").lower()
    return f"U+{ord(character):04X} ({name}), which cannot be seen: write a space, or take it out"


class _Plain:
    """Turns composed nodes into plain values and notes where each key stands."""

    def __init__(self, name: str, places: dict[Key, str]) -> None:
        self.name, self.places, self.nodes = name, places, 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        """Return a node's plain value; `key` is its place in the recipe. Raises InputError."""
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            raise InputError(
                f"{place}: over {MAX_NODES:,} values or {MAX_DEPTH} levels with aliases (*name) written out"
            )
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        if tag not in ("!!str", "!!map", "!!seq"):
            raise InputError(f"{place}: the tag {tag}; a recipe takes no tags (!...): put the value in quotes")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places.setdefault((*key, i), f"{self.name}:{item.start_mark.line + 1}")
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key)
        assert isinstance(node, yaml.ScalarNode)
        check_text(node.value, place)
        if node.style is not None:
            return node.value
        if found := _UNSEEN.match(node.value) or _UNSEEN.match(node.value[-1:]):
            raise InputError(f"{place}: {node.value!r} holds {_unseen(found[0])}")
        if node.value[:1] in _CURLED and node.value[-1:] in _CURLED and node.value:
            raise InputError(
                f"{place}: {node.value}: these quotes are a part of the text: write straight ones, or none"
            )
        return scalar(node.value)

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        """Return a mapping's plain values. Raises InputError for a key that stands twice or is no word."""
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            word = key_node.value
            if not isinstance(word, str) or word == "<<":
                raise InputError(
                    f"{self.name}:{line}: a key is one word; lists, mappings and merges (<<) cannot be keys"
                )
            check_text(word, f"{self.name}:{line}")
            if found := _UNSEEN.search(word):
                raise InputError(f"{self.name}:{line}: the key {word!r} holds {_unseen(found[0])}")
            dotted = ".".join(map(str, (*key, word)))
            if word in out:
                first = self.places[(*key, word)]
                raise InputError(f"{self.name}:{line}: {dotted} stands twice, first at {first}: remove one of the two")
            if ":" in word and key_node.style is None and not value_node.value:  # {score:5} is a key without a value
                spaced = re.sub(r":(?=\S)", ": ", word)
                raise InputError(f"{self.name}:{line}: {word!r}: put a space after the colon: {spaced}")
            self.places[(*key, word)] = f"{self.name}:{line}"
            out[word] = self.value(value_node, (*key, word))
        return out
