"""Files from outside are data of bounded size: read whole, or refused with a message; no link leads out of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError

MOST_JSON = 8 << 20  #: bytes of a config.json, an adapter_config.json, an index
MOST_LEVELS = 50  #: of lists and objects within one another; no file of ours, of PEFT's or of a model's has ten


def state_of(path: Path) -> tuple[int, ...]:
    """Return a value that is another one once a file has changed: to know whether what was read of it still holds."""
    now = path.stat()
    return now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns


def check_size(path: Path, most: int = MOST_JSON) -> None:
    """Raise InputError for a file over `most` bytes."""
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path} has {size:,} bytes; at most {most:,} are read. Is it what its name says?")


def text(path: Path, most: int = MOST_JSON, remedy: str = "") -> str:
    """Return a file's UTF-8 text; InputError where it is too long or no text."""
    try:
        check_size(path, most)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is not there{remedy and f'. {remedy}'}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}){remedy and f'. {remedy}'}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}){remedy and f'. {remedy}'}") from None


def json_object(path: Path, most: int = MOST_JSON, remedy: str = "Copy it again.") -> dict[str, Any]:
    """Return a JSON file's object; InputError where it is too long, no JSON, too deep, or no object."""
    return parsed_object(text(path, most, remedy), str(path), remedy)


def parsed_object(content: str | bytes, name: str, remedy: str = "Copy it again.") -> dict[str, Any]:
    """Return the JSON object that `content` holds; InputError, beginning with `name`, where it is none, or too deep.

    What reads such an object may call itself for each level of it, so the levels are counted here.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON ({error}). {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{name}: holds no JSON object but a {type(found).__name__}. {remedy}")
    level: list[Any] = [found]
    for _ in range(MOST_LEVELS):
        values = (inner for each in level for inner in (each.values() if isinstance(each, dict) else each))
        level = [value for value in values if isinstance(value, (dict, list))]
        if not level:
            return found
    raise InputError(f"{name}: lists and objects within one another, over {MOST_LEVELS} levels of them. {remedy}")


def refuse_links(root: Path) -> None:
    """Raise InputError where a link below `root` leads out of it: what is written here would land elsewhere.

    `root` may be a link itself.
    """
    home = root.resolve()
    for path in root.rglob("*"):  # does not walk through links
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise InputError(
                f"{path} is a link out of its run folder, to {path.resolve()}. Put the file itself there, or take the "
                "link away; the run folder as a whole may be a link."
            )
