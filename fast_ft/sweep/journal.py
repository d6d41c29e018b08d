"""The file of a sweep's study: lines in Optuna's form, which a kill, a power cut or an editor may have damaged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted

REMEDY = "Restore it from a copy, or begin a new sweep with --output."


def mend(path: Path) -> None:
    """Cut off a last line that a kill or a power cut left torn: Optuna would append to it, and could read neither.

    Raises InputError where an earlier line is damaged: later lines build on it.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")  # the last one is b"" where the file is whole
    for number, line in enumerate(lines, 1):
        if _is_operation(line) and number < len(lines):
            continue
        if not any(later.strip(b"\0") for later in lines[number:]):
            break
        cut = f"keep its first {counted(number - 1, 'line')} only (head -n {number - 1})" if number > 1 else "delete it"
        raise InputError(
            f"{path}, line {number}: damaged, and more lines follow. Restore the file from a copy, or {cut}: trials "
            "that are lost so are begun again, and find what they trained in their folders."
        )
    whole = b"".join(each + b"\n" for each in lines[: number - 1])
    with path.open("r+b") as file:
        file.truncate(len(whole))


def _is_operation(line: bytes) -> bool:
    """Return whether a line of the journal is whole: a JSON object with an operation of Optuna's."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "op_code" in found and "worker_id" in found


class LeaseLock:
    """Stands in for Optuna's lock on its journal: a sweep holds its whole folder by a lease, checked at each write."""

    def __init__(self, check: Callable[[], object]) -> None:
        self._check = check

    def acquire(self) -> bool:
        """Return True, unless `check` raises: then the line is not written."""
        self._check()
        return True

    def release(self) -> None:
        """Do nothing: the lease is held until the command ends."""


@contextlib.contextmanager
def read_by_optuna(path: Path) -> Iterator[None]:
    """Turn any error of Optuna's within, while it replays the file's lines, into InputError."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise InputError(f"{path}: Optuna cannot read it ({type(error).__name__}: {error}). {REMEDY}") from error
