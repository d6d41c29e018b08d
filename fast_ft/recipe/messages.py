"""What is wrong with a recipe's values, in plain English: path, value, what is allowed, remedy."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fast_ft.common.errors import nearest
from fast_ft.recipe.schema import Recipe
from fast_ft.recipe.yaml_source import Key, scalar

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
#: Keys that recipes once had, and what to write instead.
_GONE = {
    "data.multi_turn": "rows of several turns are trained as they are. Take the key out; data.train_on says whether "
    "all of a row's answers are trained (all) or the last one (last)",
}


@functools.cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def explain(errors: Iterable[Any], tree: dict[str, Any]) -> list[tuple[Key, str]]:
    """Return (key, sentence) for each of pydantic's errors, one per key, in plain words.

    The sentences are made from the recipe's JSON Schema, not from pydantic's messages: those name Python's types and
    report a union once for each of its members.
    """
    root = _schema()
    problems: dict[Key, str] = {}
    for error in errors:
        loc: Key = error["loc"]
        if error["type"] == "extra_forbidden":
            loc = (*_descend(root, loc[:-1])[0], loc[-1])
            hint = _suggestion(root, loc)
            if str(loc[-1]).startswith(("push_to_hub", "hub_")):
                hint = "; nothing is ever pushed to a hub from here: upload the adapter folder yourself, if you may"
            gone = _GONE.get(_dotted(loc))
            problems[loc] = f"{_dotted(loc)}: " + (f"this key is gone: {gone}" if gone else f"unknown key{hint}")
            continue
        key, schema = _descend(root, loc)
        if key in problems:
            continue
        meaning = f" ({schema['description'].rstrip('.')})" if "description" in schema else ""
        if error["type"] == "missing":
            problems[key] = f"{_dotted(key)}: missing; it takes {allowed(schema, root)}{meaning}"
            continue
        value = _at(tree, key)
        text = f"{_dotted(key)}: {show(value)} is not allowed; it takes {allowed(schema, root)}"
        problems[key] = text + _hint(value, schema, root)
    # Of a union pydantic reports every member; what is wrong within one of them says more.
    inner = {key[:end] for key in problems for end in range(len(key))}
    return [(key, text) for key, text in problems.items() if key not in inner]


def without_keys(tree: dict[str, Any], bad: Sequence[Key]) -> dict[str, Any]:
    """Return `tree` without the wrong keys, and with stand-ins for keys that a recipe must have."""
    tree = copy.deepcopy(tree)
    for key in bad:
        at: Any = tree
        for part in key[:-1]:
            at = _at(at, (part,)) if isinstance(at, dict | list) else None
        if isinstance(at, dict):
            at.pop(key[-1], None)
        if key[:2] == ("curriculum", "stages") and isinstance(at, dict) and key[-1] == "name":
            at["name"] = f"stage-{key[2]}"
    for section, required in (("model", "name_or_path"), ("data", "train")):
        tree.setdefault(section, {}).setdefault(required, "unknown")
    return tree


def uncertain_keys(problems: Iterable[tuple[Key, str]], tree: dict[str, Any]) -> set[str]:
    """Return the dotted keys whose value is unknown: wrong keys, and keys that a misspelt one may stand for."""
    keys = set()
    for key, text in problems:
        keys.add(_dotted(key))
        if meant := re.search(r"unknown key \(did you mean '([^']+)'", text):
            dotted = {meant[1], _dotted((*key[:-1], meant[1]))}
            keys |= {path for path in dotted if not _given(tree, path)}
    return keys


def show(value: object) -> str:
    """Return a value as YAML's flow style would write it, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def allowed(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Return in words what a piece of JSON Schema allows."""
    schema = resolve(schema, root)
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(allowed(part, root) for part in schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if entries := schema.get("prefixItems"):
        return f"a list of {len(entries)}, each entry {' or '.join(dict.fromkeys(allowed(e, root) for e in entries))}"
    if schema.get("type") == "array":
        return f"a list, each entry {allowed(schema['items'], root)}"
    if "properties" in schema:
        words = f"a section with the keys {', '.join(schema['properties'])}"
        return words if "required" in schema else f"{words} (leave it out for the defaults)"
    if schema.get("type") == "object":
        return f"`name: value` pairs, each value {allowed(schema['additionalProperties'], root)}"
    if "pattern" in schema:
        return f"text of the form {schema['pattern'].strip('^$')}"
    if "maxLength" in schema:
        return f"text of {schema['minLength']} to {schema['maxLength']} characters"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    limits = []
    if low is not None:
        limits.append(f"{'at least' if 'minimum' in schema else 'above'} {low:g}")
    if high is not None:
        limits.append(f"{'at most' if 'maximum' in schema else 'below'} {high}")
    return " ".join(filter(None, [_KINDS.get(schema.get("type", ""), "any value"), " and ".join(limits)]))


def _hint(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> str:
    words = allowed(schema, root)
    if isinstance(value, str):
        if "number" in words and not isinstance(scalar(value), str | bool | None):
            return "; write it without quotes"
        if "number" in words and not isinstance(scalar(value.replace("_", "").replace(",", "")), str | bool | None):
            return "; write digits only, with a point for the decimals"
        if "number" in words and not isinstance(scalar(re.sub("[\u2010-\u2015\u2212]", "-", value)), str | bool | None):
            return "; write a hyphen (-) for the minus"
        if "true or false" in words and value.lower() in ("yes", "on", "no", "off", "true", "false"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}, unquoted"
        if " or " in words:
            return nearest(value, words.replace(",", "").split(" or "))
    elif schema.get("type") == "string" and isinstance(value, int | float):
        return "; write it in quotes"
    elif isinstance(value, float) and value.is_integer() and "whole number" in words:
        return f"; write {int(value)}"
    return ""


def _suggestion(root: dict[str, Any], loc: Key) -> str:
    word = str(loc[-1])
    elsewhere = [path for path in _paths(root, root) if path.split(".")[-1] == word]
    if elsewhere:  # the right key in the wrong section
        return f" (did you mean {elsewhere[0]!r}?)"
    known = list(resolve(_descend(root, loc[:-1])[1], root).get("properties", ()))
    return nearest(word, known) or f"; known here: {', '.join(known)}"


def _paths(schema: dict[str, Any], root: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, part in resolve(schema, root).get("properties", {}).items():
        found += [prefix + name, *_paths(part, root, f"{prefix}{name}.")]
    return found


def resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Return a piece of the schema itself where `schema` only refers to it."""
    if "$ref" not in schema:
        return schema
    return root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]


def _descend(root: dict[str, Any], loc: Key) -> tuple[Key, dict[str, Any]]:
    """Return the part of `loc` that the schema knows, and its piece. Names of unions' members, which pydantic puts
    between the keys, are left out.
    """
    key: Key = ()
    schema = root
    for part in loc:
        for option in _options(schema, root):
            option = resolve(option, root)
            inner = (
                option.get("properties", {}).get(part) if "properties" in option else option.get("additionalProperties")
            )
            if isinstance(part, int):
                inner = dict(enumerate(option.get("prefixItems", []))).get(part, option.get("items"))
            if isinstance(inner, dict):
                schema, key = inner, (*key, part)
                break
        else:
            if "anyOf" not in resolve(schema, root):
                break
    return key, schema


def _options(schema: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the members of a union, of unions in it too; of another schema itself."""
    schema = resolve(schema, root)
    return [each for part in schema.get("anyOf", []) for each in _options(part, root)] or [schema]


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else tree[part]
    return tree


def _given(tree: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
