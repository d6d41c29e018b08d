"""Notes and progress on stderr: a bar in a terminal, and a line now and then where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from fast_ft.common.redaction import redacted
from fast_ft.common.streams import new_console
from fast_ft.common.text_safety import harmless

_EVERY = 15.0  #: seconds between two lines where stderr is no terminal


_silent = False  # of the module, since notes come from everywhere in a process; `be_silent` alone sets it


def be_silent() -> None:
    """Print no notes from here on: of several processes that train together, the first one says them."""
    global _silent
    _silent = True


def note(text: str) -> None:
    """Write text to stderr, fit for a terminal and without keys. stdout is kept for what a program reads (`--json`)."""
    if _silent:
        return
    print(harmless(redacted(text)), file=sys.stderr, flush=True)


def labelled(text: str) -> str:
    """Return what a run notes as it is shown: with a word before it that says what it is, if it has none."""
    return text if text.startswith("warning: ") else f"note: {text}"


class Bar:
    """A bar over `total` units of work, to be used in a with statement.

    `advance(by, facts)` moves it; `facts` is a short text of what was measured. In a terminal rich draws it; elsewhere
    (a log file, a Colab subprocess) one line is printed every 15 s and at the end.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._live = sys.stderr.isatty()
        self._started = self._printed = time.monotonic()
        self._first = done

    def __enter__(self) -> Bar:
        if self._live:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[facts]}"),
                progress.TimeRemainingColumn(),
                console=new_console(sys.stderr),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, facts="")
        return self

    def advance(self, by: int = 1, facts: str = "") -> None:
        """Move the bar by some units. facts: what was measured, in a few words."""
        self.done += by
        if self._live:
            self._bar.update(self._task, advance=by, facts=facts)
            return
        now = time.monotonic()
        if now - self._printed >= _EVERY or self.done >= self.total:
            self._printed = now
            left = (now - self._started) / max(1, self.done - self._first) * (self.total - self.done)
            note("  ".join(filter(None, [self.title, f"{self.done}/{self.total}", facts, f"{left:.0f} s left"])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
