"""Keys and tokens of the environment, and text without them. What goes to the terminal passes through here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from types import TracebackType

#: Environment variables whose values must not get out.
_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_LEAST = 8  #: shorter values stand in any text by chance


def values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return {value: variable's name} for the environment's keys."""
    return {
        value.strip(): name
        for name, value in environment.items()
        if _NAMES.search(name) and len(value.strip()) >= _LEAST and "/" not in value.strip()[:1]
    }


def redacted(text: str) -> str:
    """Return the text with the name of the variable in the place of each key: [HF_TOKEN]."""
    for value, name in sorted(values().items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"[{name}]")
    return text


def redact_tracebacks() -> None:
    """Print a bug's traceback without keys, from any thread: an exception's text may hold what it was given."""
    import threading
    import traceback  # here, so that --help need not load it

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        """Print a traceback without keys; sys.excepthook."""
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    def show_thread(arguments: threading.ExceptHookArgs) -> None:
        """Do the same for a thread; threading.excepthook."""
        if arguments.exc_type is not SystemExit:
            show(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook, threading.excepthook = show, show_thread
