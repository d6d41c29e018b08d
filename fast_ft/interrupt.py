"""SIGTERM and SIGHUP stop a run as Ctrl-C does: files whole, state saved, exit status 130."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt within, where nobody chose otherwise (nohup ignores SIGHUP).

    Training has its own handling on top of this: it finishes the step in hand first (train.py).
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [kind for kind in kinds if signal.getsignal(kind) == signal.SIG_DFL]

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    for kind in ours:
        signal.signal(kind, stop)
    try:
        yield
    finally:
        for kind in ours:
            signal.signal(kind, signal.SIG_DFL)
