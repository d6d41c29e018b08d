"""stdout and stderr, set up once for every command: text that they cannot show is escaped, a reader may leave early."""

from __future__ import annotations

import codecs
import os
import select
import sys
from typing import Any, TextIO

from fast_ft.common import environment

READER_LEFT = 141  #: the exit status of a Unix tool whose reader, such as head, has left: 128 + SIGPIPE
_ERRORS = "fast_ft.escape"


def set_up() -> None:
    """Let both streams take any text, and let what is printed have a width."""
    codecs.register_error(_ERRORS, _escape)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
    environment.drop_impossible_sizes()


def reader_left() -> bool:
    """Return whether a reader of stdout or stderr has left; any other broken pipe is a bug."""
    if not hasattr(select, "poll"):
        return True  # Windows cannot tell
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if (number := _number(stream)) is not None:
            poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def finish() -> None:
    """Write what is left. A stream that takes nothing more leads nowhere then, so that Python's last flush succeeds."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            if (number := _number(stream)) is not None:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def new_console(file: TextIO | None = None) -> Any:
    """Return rich's console on `file` (default: stdout); a reader that left is BrokenPipeError, as for print."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            """Raise BrokenPipeError, where rich would end the process with status 1."""
            self.quiet = True
            raise BrokenPipeError

    return Quiet(file=file or sys.stdout, highlight=False)


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""Replace what an encoding lacks by \uXXXX, as `text_safety.harmless` does and as JSON reads it."""
    assert isinstance(error, UnicodeEncodeError)
    wide = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    units = (wide[at : at + 2].hex() for at in range(0, len(wide), 2))
    return "".join(f"\\u{unit}" for unit in units), error.end


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None  # a test's or a notebook's stand-in
