"""JSON and JSONL as rows; what is wrong with a file is named, with line, column and remedy."""

from __future__ import annotations

import json
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.data.splits import names_a_split, split_of

#: Keys under which a JSON object may hold its rows; the name of the split that is asked for comes before them.
ROW_KEYS = ("data", "rows", "train", "test", "examples", "instances")


def rows(text: str, name: str, split: str) -> tuple[list[Any], bool]:
    """Return the rows of a JSON list, of a JSON object that holds or is rows, or of JSONL.

    Second: whether they are those of the split that was asked for, which an object may hold among others. Raises
    InputError.
    """
    lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028
    filled = [number for number, line in enumerate(lines) if line.strip()]
    jsonl = len(filled) > 1 and text.lstrip().startswith("{") and _whole(lines[filled[0]])
    number = 0
    try:
        if jsonl:
            found = []
            for number in filled:
                found.append(_parsed(lines[number]))
            return found, False
        content = _parsed(text)
    except json.JSONDecodeError as error:
        line = number + 1 if jsonl else error.lineno
        raise InputError(
            f"{name}, line {line}, column {error.colno}: not valid JSON: {_why(error, jsonl and number != filled[-1])}"
        ) from error
    except (ValueError, RecursionError) as error:
        place = f"{name}, line {number + 1}" if jsonl else name
        raise InputError(f"{place}: not usable JSON: {str(error).rstrip('. ')}. Mend the file.") from error
    if isinstance(content, dict):
        return _of_object(content, name, split)
    if not isinstance(content, list):
        raise InputError(f"{name}: holds no rows but one value ({type(content).__name__}). Give a list of objects.")
    return content, False


def _of_object(content: dict[str, Any], name: str, split: str) -> tuple[list[Any], bool]:
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if (found := split_of(split, lists)) is not None:
        return content[found], True
    splits = [key for key in lists if names_a_split(key)]
    if len(splits) > 1:
        raise InputError(
            f"{name}: it has the splits {', '.join(splits)}, none called {split}. Set split to one of them, or write "
            "the rows that are meant to a file of their own."
        )
    for key in (*splits, *ROW_KEYS):
        if key in lists:
            return content[key], False
    return [content], False


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. ValueError where a key stands twice: of two texts one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        values = " and ".join(repr(value)[:60] for key, value in pairs if key == twice)
        raise ValueError(f"the key {twice!r} stands more than once in one object, as {values}. Only one can be read")
    return found


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _why(error: json.JSONDecodeError, more_lines: bool) -> str:
    """Return what is wrong where the parser stopped, and the remedy; `more_lines`: further rows follow this one."""
    text, at = error.doc, error.pos
    before, here = text[:at].rstrip(), text[at:].lstrip()
    if here[:1] == ",":  # some versions of Python stop at the comma itself, others behind it
        before, here = before + ",", here[1:].lstrip()
    if before.endswith(",") and here[:1] in ("]", "}"):
        return f"a comma before the closing {here[0]}. Take the comma out."
    if "\r" in text and "\n" not in text:
        return (
            "its line ends are carriage returns alone (CR), as old Mac programs write them. Save it with line feeds "
            "(LF), for example with: tr '\\r' '\\n' < FILE > NEW"
        )
    cut = not here or error.msg.startswith("Unterminated") or ("escape" in error.msg and len(text) - at < 8)
    if cut and not more_lines:
        return f"{error.msg}. The file ends too early, and may be cut off: compare its size with the original's."
    if here.startswith("'"):
        return "text in single quotes, as Python prints it. JSON has double quotes: write the file with json.dump."
    if here.startswith(("//", "/*", "#")):
        return "a comment, which JSON does not have. Take it out."
    if here.startswith(("None", "True", "False")):
        return "a value as Python prints it. JSON has null, true and false: write the file with json.dump."
    if error.msg == "Extra data" and here[:1] in ("{", "["):
        return "several values one behind the other. Write one row a line (JSONL), or one list of all rows."
    if before.endswith(("}", "]")) and here[:1] in ("{", "["):
        return f"{error.msg}. A comma is missing between two rows: add it."
    return f"{error.msg}. Mend the file there."
