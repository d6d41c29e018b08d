"""Where the seconds of a phase went: each second counts for one name only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Stopwatch:
    """Runs from when it is made. Seconds that no name is measured for count as "other"."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._since = clock, clock()
        self._name, self._covered = "other", frozenset[str]()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def during(self, name: str, *, covers: frozenset[str] = frozenset()) -> Iterator[None]:
        """Count the seconds that pass within for `name`. Seconds measured within for another name count for that one.

        Names in `covers` are an exception: their seconds count for `name` too, so that a check that decodes is a check.
        """
        if name in self._covered:
            yield
            return
        outer = self._name, self._covered
        self._switch(name, covers)
        try:
            yield
        finally:
            self._switch(*outer)

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far by name, those that took longest first; their sum is all that passed."""
        self._switch(self._name, self._covered)
        return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))

    def _switch(self, name: str, covered: frozenset[str]) -> None:
        now = self._clock()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._since, self._name, self._covered = now, name, covered
