"""Out of memory: told apart from other errors, tried again after unused memory was given back, or explained."""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

from fast_ft.common.errors import InputError

LOADING = (
    "The base model alone does not fit. Set model.load_in_4bit: true, end other programs on the card (nvidia-smi lists "
    "them), or take a smaller base model."
)
TRAINING = "Lower lora.r or model.max_length, set train.optim: adamw_8bit, or free the card."
ANSWERING = "Lower generate.max_new_tokens or generate.batch_size, or free the card."

#: How torch, Triton, CUDA's libraries and the system say it where a RuntimeError of no particular kind is raised.
_SAID = (
    "out of memory", "_status_alloc_failed", "error_out_of_memory", "can't allocate memory", "cannot allocate memory",
    "not enough memory", "can't start new thread",
)  # fmt: skip
#: How it is said where a library found no room for its own code or threads.
_SAID_LOADING = ("failed to map segment", "cannot allocate memory", "static TLS block")

#: Address space that a small run took on two cores: it failed with 2.6 million KiB and passed with 3.2 million.
_ADDRESS_SPACE_KIB = 3_200_000

Result = TypeVar("Result")


def check_address_space() -> None:
    """Raise InputError where this process may not have the address space that loading torch and a model takes.

    Libraries in C end the process where they find none, which no handler can turn into a sentence.
    """
    try:
        import resource
    except ImportError:  # not a Unix
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE_KIB * 1024:
        raise InputError(
            f"this shell allows a process {limit // 1024:,} KiB of address space (ulimit -v); torch and a small model "
            f"take {_ADDRESS_SPACE_KIB:,} KiB. Raise the limit (ulimit -v unlimited), then run the command again"
        )


def is_short(error: BaseException) -> bool:
    """Return whether an error says that the card or the machine is out of memory.

    The end of a CUDA graph's capture may fail in its turn where memory ran out within, and hides why.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, ImportError):
        said = str(error).lower()
        wrapped = error.__cause__ is not None and is_short(error.__cause__)  # transformers' lazy modules do so
        return wrapped or any(text.lower() in said for text in _SAID_LOADING)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or (error.errno is None and _SAID_LOADING[0] in str(error))
    if not isinstance(error, RuntimeError):
        return False
    hidden = error.__context__
    return any(text in str(error).lower() for text in _SAID) or (hidden is not None and is_short(hidden))


def release() -> None:
    """Give back memory that is held and not needed. Call it outside of an error's handler: a traceback holds much."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clear_workspaces() -> None:
    """Give back what cuBLAS holds: 32 MiB and more for each stream and thread.

    To be called when nothing runs on the card, and no graph that was captured before will run again.
    """
    import torch

    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def retried(attempt: Callable[[], Result]) -> Result:
    """Return what `attempt` returns; where memory runs out in it, release() and try once more."""
    try:
        return attempt()
    except Exception as error:
        if not is_short(error):
            raise
    release()
    return attempt()


@contextlib.contextmanager
def explained(what: str, remedy: str | Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error within, of the card or of the machine, into InputError that says what to change."""
    try:
        yield
    except Exception as error:
        if not is_short(error):
            raise
        on_card = type(error).__name__ == "OutOfMemoryError" or "CU" in str(error)
        where = "the card's memory" if on_card else "the machine's memory"
        said = remedy if isinstance(remedy, str) else remedy()
        raise InputError(f"out of {where} while {what}. {said}") from error
