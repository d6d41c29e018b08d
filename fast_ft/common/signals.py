"""SIGTERM and SIGHUP stop a run as Ctrl-C does: files whole, state saved, exit status 130."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

GRACE = 9.0  #: seconds between a signal and the end of the process, whatever it still waits for

#: Whether the step in hand is being finished, however long it takes. It is the module's, since a process has one set of
#: signal handlers; `calling` alone sets it.
_finishing = False


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt within, where nobody chose otherwise (nohup ignores SIGHUP)."""
    return _handled(_unhandled(), _raise)


@contextlib.contextmanager
def calling(stop: Callable[[], None], names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> Iterator[None]:
    """Call `stop` at Ctrl-C (SIGINT), SIGTERM or SIGHUP within: training finishes the step in hand first."""
    global _finishing
    with _handled(_known(*names), stop):
        _finishing = True
        try:
            yield
        finally:
            _finishing = False


def end_in_time() -> None:
    """End this process, from here to its end, GRACE seconds after a signal that stops it, and at once after a second.

    The command gets KeyboardInterrupt at the signal, and in most cases it ends by itself. A thread of some library may
    wait for a server all the same, or the main thread for a name to be looked up. Such a process ends with status 130
    too: what is on the disk then is what a kill leaves, with which the next command goes on. While training finishes
    its step (`calling`), nothing is cut short.
    """
    raised = False

    def ask(*_: object) -> None:
        """Raise KeyboardInterrupt once. A second one would break what the first is unwinding, such as a lock."""
        nonlocal raised
        if raised:
            os._exit(130)
        raised = True
        raise KeyboardInterrupt

    kinds = _known("SIGINT", "SIGTERM", "SIGHUP")
    for kind in kinds:
        if kind in _unhandled() or signal.getsignal(kind) is signal.default_int_handler:
            signal.signal(kind, ask)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Written to as the signal arrives, also while the main thread is in a call that it cannot leave.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reader, {int(kind) for kind in kinds}), daemon=True).start()


def _end(reader: int, kinds: set[int]) -> None:
    while os.read(reader, 1)[0] not in kinds or _finishing:
        pass
    select.select([reader], [], [], GRACE)  # a second signal ends it at once
    os._exit(130)


def _raise() -> None:
    raise KeyboardInterrupt


def _unhandled() -> list[signal.Signals]:
    return [kind for kind in _known("SIGTERM", "SIGHUP") if signal.getsignal(kind) == signal.SIG_DFL]


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
