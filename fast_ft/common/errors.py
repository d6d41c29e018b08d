"""The errors that reach a user, and the exit status that each one means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """The user's input is wrong: one message, no traceback, exit status 2.

    The message says the value, what was allowed, and the remedy. It is a class of its own, so that a
    ValueError from a library stays what it is: a bug, with its traceback.
    """


class BudgetMissed(Exception):
    """A budget is exceeded or a check failed; what there is was saved; exit status 3.

    `complete`: the folder of a run that lacks nothing all the same.
    """

    def __init__(self, message: str, complete: Path | None = None) -> None:
        super().__init__(message)
        self.complete = complete


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the allowed word closest to `word`, or ""."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
