"""Files that a user names for what a command writes: they take no other file's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fast_ft.common.errors import InputError


def check_output(output: str | Path, own: Callable[[bytes], bool], example: str) -> Path:
    """Return the path of `--output`. Raises InputError where a file of another kind, a folder or a device is there.

    own: whether the content of a file is such as the command writes, which may be written over. example: a file's name
    for the message.
    """
    path = Path(output)
    if path.is_dir():
        raise InputError(f"--output {path}: that is a folder. Name a file, such as {path / example}")
    if path.exists() and not path.is_file():
        raise InputError(f"--output {path}: that is a pipe or a device. Name a file, such as {example}")
    if path.is_file() and not own(path.read_bytes()):
        raise InputError(
            f"--output {path}: there is a file of this name that this command did not write, and it is not written "
            "over. Name another file, or delete that one."
        )
    return path
