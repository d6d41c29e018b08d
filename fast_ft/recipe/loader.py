"""Read a recipe: YAML with line numbers, overrides, and every problem reported at once.

Relative paths in a recipe are relative to the current directory, not to the recipe's folder: the homework's recipes
are started from the repository's root, where the homework's files lie under data/.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.recipe import effects, messages
from fast_ft.recipe.schema import Recipe
from fast_ft.recipe.yaml_source import Key, check_text, parse, read_yaml, scalar

#: Keys that change nothing of what a run is.
NO_PART = ("run_name", "output_dir", "backup_dir")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, put `overrides` ("lora.r=32") over it, check it, and return it frozen.

    Raises InputError that lists every problem found: key, place (file:line, or the override), value, what is
    allowed, and what to do. Warnings are not raised: `fast_ft.recipe.lint.lint(recipe)` returns them.
    """
    tree, places = read_yaml(Path(path))
    return _overridden(tree, places, overrides, str(path))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return `recipe` with overrides put over it, checked as load_recipe checks."""
    return _overridden(resolved(recipe), {}, overrides, "the run's recipe")


def validated(tree: dict[str, Any], places: dict[Key, str], name: str, *, consequences: bool = True) -> Recipe:
    """Return the Recipe that `tree` describes, or raise InputError with all problems.

    `places` says where each key stands ("strong.yaml:12"); a key without a place gets its section's, or `name`.
    consequences: check too what the values lead to together (lint, rules), besides each value alone.
    """
    from fast_ft.recipe.lint import Problem, lint
    from fast_ft.recipe.policy_ntu_hw5 import check_recipe

    problems: list[tuple[Key, str]] = []
    try:
        recipe = Recipe.model_validate(_tuples(tree), strict=True)
    except ValidationError as error:
        problems = messages.explain(error.errors(include_url=False), tree)
        patched = messages.without_keys(tree, [key for key, _ in problems])
        try:  # so that what is wrong elsewhere shows at once, not on the next attempt
            recipe = Recipe.model_validate(_tuples(patched), strict=True)
        except ValidationError:
            _raise(problems, places, name)
    if not consequences and not problems:
        return recipe
    uncertain = messages.uncertain_keys(problems, tree)
    found = [*lint(recipe)[0], *(Problem(text, (text.split(":")[0],)) for text in check_recipe(recipe))]
    for problem in found:
        # A default stands where a value was wrong: what follows from it is not the user's fault.
        if not any(
            k == bad or k.startswith(bad + ".") or bad.startswith(k + ".") for k in problem.keys for bad in uncertain
        ):
            problems.append((tuple(int(p) if p.isdigit() else p for p in problem.keys[0].split(".")), problem.text))
    if problems:
        _raise(problems, places, name)
    return recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with every default written out, as plain JSON values; `search` is no part of a run."""
    return recipe.model_dump(mode="json", exclude={"search"})


def json_schema() -> dict[str, Any]:
    """Return the recipe's JSON Schema: every key, type, default and limit."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def digest(recipe: Recipe) -> str:
    """Return 64 hex digits that change with any key but NO_PART: a run is not where it is kept, nor its name."""
    return content_digest(resolved(recipe))


def content_digest(tree: dict[str, Any]) -> str:
    """Return the digest of a recipe that is written out already, as a manifest holds it."""
    content = {key: value for key, value in tree.items() if key not in NO_PART}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def apply_override(tree: dict[str, Any], places: dict[Key, str], override: str) -> Key:
    """Put one "dotted.key=value" into `tree`, and return its key; YAML reads the value. Raises InputError."""
    dotted, equals, text = override.partition("=")
    check_text(dotted, f"override {override!r}")
    # More digits than any list has entries are a word; Python refuses to read some thousand of them.
    key: Key = tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in dotted.strip().split("."))
    if key[:2] == ("search", "space") and len(key) > 2:  # its keys are dotted themselves
        key = (*key[:2], dotted.strip().split(".", 2)[2])
    if not equals or "" in key:
        raise InputError(f"override {override!r}: write it as key=value, for example lora.r=32")
    if text.startswith("=") and key[:2] != ("select", "where"):  # a condition may begin with ==
        raise InputError(f"override {override!r}: two signs = in a row; write it with one, {dotted}{text}")
    at: Any = tree
    for depth, part in enumerate(key):
        here = ".".join(map(str, key[:depth]))
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                raise InputError(
                    f"override {override!r}: {here} has {counted(len(at), 'entry', 'entries')}, counted from 0; "
                    f"no {part!r}"
                )
        elif isinstance(at, dict):
            part = str(part)
        else:
            raise InputError(f"override {override!r}: {here} is {messages.show(at)}, which has no keys below it")
        if depth == len(key) - 1:
            at[part] = _override_value(text, f"override {override}")
        else:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
                places.setdefault(key[: depth + 1], f"override {override}")
            at = at[part]
    # Somebody may write an API key here; the message that refuses it must not repeat it.
    secret = re.search(r"(^|_)(key|secret|password|token)$", str(key[-1]), re.IGNORECASE)
    places[key] = f"override {dotted}=..." if secret else f"override {override}"
    return key


def _overridden(tree: dict[str, Any], places: dict[Key, str], overrides: Sequence[str], name: str) -> Recipe:
    keys = [apply_override(tree, places, override) for override in overrides]
    recipe = validated(tree, places, name)
    recipe._typed = frozenset(".".join(map(str, key)) for key in keys)
    unused = effects.unused_keys(recipe)
    problems = []
    for key, override in zip(keys, overrides, strict=True):
        for dotted, value in _leaves(key, _at(tree, key)):
            if not effects.is_blank(value):
                problems += [
                    (key, f"{dotted}: not used, since {each.since}. {_instead(each, dotted, value, override)}")
                    for each in unused
                    if each.covers(dotted)
                ]
    if problems:
        _raise(problems, places, name)
    return recipe


def _leaves(key: Key, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values that one override gives: several, where its value is a whole section."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves((*key, name), inner)
    else:
        yield ".".join(map(str, key)), value


def _at(tree: Any, key: Key) -> Any:
    """Return the value at a key; None where a later override has replaced it."""
    for part in key:
        try:
            tree = tree[part if isinstance(tree, list) else str(part)]
        except (LookupError, TypeError):
            return None
    return tree


def _instead(unused: effects.UnusedKey, dotted: str, value: Any, override: str) -> str:
    """Return the sentence with the overrides that work, written so that a shell takes them."""
    text = messages.show(value)
    own = override if override.partition("=")[0].strip() == dotted else f"{dotted}={text}"
    words = [shlex.quote(own if word == "KEY=VALUE" else word.replace("VALUE", text)) for word in unused.instead]
    return f"What works: {' '.join(words)}"


def _override_value(text: str, name: str) -> Any:
    # Only lists, mappings and quoted text need the parser. All else is one scalar, so that `>= 4` (to YAML the
    # start of a folded block), `!= 3` (a tag) and a path with " #" in it (a comment) come through as they are.
    text = text.strip()
    check_text(text, name)
    if not text.startswith(("[", "{", '"', "'")):
        return scalar(text)
    return parse(text, name)


def _tuples(value: Any) -> Any:
    # Strict checking takes no list for a tuple; a frozen recipe holds tuples.
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _raise(problems: list[tuple[Key, str]], places: dict[Key, str], name: str) -> NoReturn:
    def place(key: Key) -> str:
        """Return where a key stands, or the nearest section around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in places:
                return places[key[:end]]
        return name

    def order(item: str) -> tuple[bool, int]:
        """Sort by line number; overrides come last."""
        match = re.match(re.escape(name) + r":(\d+): ", item)
        return (match is None, int(match[1]) if match else 0)

    lines = sorted(dict.fromkeys(f"{place(key)}: {text}" for key, text in problems), key=order)
    if len(lines) == 1:
        raise InputError(lines[0])
    raise InputError(f"{name} has {len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines))
