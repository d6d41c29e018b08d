"""A module of the doctor's in a process of its own: a broken driver or kernel may end it, or keep it for ever."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from fast_ft.common import environment
from fast_ft.doctor import versions


@dataclass(frozen=True)
class Done:
    """What a process printed, and its exit status: None where it was stopped for taking too long."""

    status: int | None
    out: str
    errors: str

    @property
    def last_line(self) -> str:
        """The last line that it printed to stderr, cut at 500 characters."""
        return (self.errors.strip().splitlines() or ["no message"])[-1][:500]


def run(module: str, seconds: float) -> Done:
    """Run `python -m MODULE`, without a network for the hub's libraries, for at most `seconds`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module], capture_output=True, text=True, errors="replace", timeout=seconds,
            env=environment.for_child(str(versions.ROOT), HF_HUB_OFFLINE="1"),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return Done(None, _text(late.stdout), _text(late.stderr))
    return Done(done.returncode, done.stdout, done.stderr)


def _text(printed: bytes | str | None) -> str:
    """Return what a stopped process printed, which subprocess hands back as bytes."""
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
