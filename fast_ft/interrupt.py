"""SIGTERM and SIGHUP stop a run as Ctrl-C does: files whole, state saved, exit status 130."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt within, where nobody chose otherwise (nohup ignores SIGHUP)."""

    def stop() -> None:
        raise KeyboardInterrupt

    kinds = _known("SIGTERM", "SIGHUP")
    return _handled([kind for kind in kinds if signal.getsignal(kind) == signal.SIG_DFL], stop)


def calling(stop: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call `stop` at Ctrl-C, SIGTERM or SIGHUP within: training finishes the step in hand first."""
    return _handled(_known("SIGINT", "SIGTERM", "SIGHUP"), stop)


def _known(*names: str) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP


@contextlib.contextmanager
def _handled(kinds: list[signal.Signals], stop: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {kind: signal.signal(kind, lambda *_: stop()) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
