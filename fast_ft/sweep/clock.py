"""The hours of a sweep, over all commands that worked on it. They are written to the disk every two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.sweep import files

_EVERY = 2.0


class Clock:
    """Counts seconds against `allowed` (None: no limit), from what earlier commands used."""

    def __init__(self, path: Path, allowed: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self.allowed, self._now = path, allowed, now
        self._before = files.read_clock(path) if path.is_file() else 0.0
        self._started = self._written = now()

    @property
    def used(self) -> float:
        """Seconds used so far, in all commands."""
        return self._before + self._now() - self._started

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self.allowed is None else self.allowed - self.used

    def tick(self, *, now: bool = False) -> None:
        """Write what was used, at most every two seconds."""
        if now or self._now() - self._written >= _EVERY:
            self._written = self._now()
            atomic_files.write_json(self._path, {"seconds": round(self.used, 1)})
