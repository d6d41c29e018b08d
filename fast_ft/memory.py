"""Out of memory where no smaller piece is left: said in words, with what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fast_ft.errors import InputError

LOADING = (
    "The base model alone does not fit. Set model.load_in_4bit: true, end other programs on the card (nvidia-smi lists "
    "them), or take a smaller base model."
)
SAVING = "Nothing is lost: the last checkpoint holds every step. Free memory here, and run the same command again."
ANSWERING = "Lower generate.max_new_tokens or generate.batch_size, or free the card."


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error within, of the card or of the machine, into InputError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        where = "the machine's memory" if isinstance(error, MemoryError) else "the card's memory"
        raise InputError(f"out of {where} while {what}. {remedy}") from error
