"""How tests wait for something that must come: for the thing itself, and not for a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds after which a test says that something never came. On a free machine it comes within a second; a machine that
#: is busy with much else may take a hundred times as long. This bounds a failing test alone.
PATIENCE = 240.0


def wait_until(there: Callable[[], object], still: Callable[[], object] = lambda: True, what: object = "") -> None:
    """Return as soon as `there` is true. Fails where `still` is false before, or after PATIENCE seconds.

    `there` is asked once more after `still` was false: a process may do the last thing and end between the two.
    """
    until = time.monotonic() + PATIENCE
    while not there():
        assert still() or there(), f"what should have come ended before: {what() if callable(what) else what}"
        assert time.monotonic() < until, f"never: {what() if callable(what) else what}"
        time.sleep(0.005)
