"""Which process is which on this machine, and what it has open."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def boot() -> str | None:
    """Return what tells this boot, and this container's process ids, from others; None where nothing does."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{identity} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """Return when a process of this machine started, in the kernel's own ticks; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a killed process is a zombie until its parent asks for it


def age() -> float | None:
    """Return the seconds since this process was started, before any of its code ran; None where nothing tells."""
    ticks = started(os.getpid())
    if ticks is None:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def has_open(pid: int, folder: Path) -> bool:
    """Return whether a process of this machine holds this very folder open, and not one that it was copied from."""
    try:
        wanted = folder.stat()
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True  # another user's process does not tell: it counts as the holder
    for link in links:
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), wanted):
                return True
    return False
