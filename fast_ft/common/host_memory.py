"""The machine's memory: what is free, and what this process may hold. The limits of its control groups count."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: A group's files by the version of control groups: its limit, what it holds, and how its statistics call the pages
#: that are copies of files, which the system takes back when it needs room.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes() -> int:
    """Return the bytes of memory that are free, for this process too."""
    import psutil

    return min([psutil.virtual_memory().available, *(free for _, free in _groups())])


def whole_bytes() -> int:
    """Return the bytes of memory that this process may ever hold, whatever is taken of them now."""
    import psutil

    return min([psutil.virtual_memory().total, *(most for most, _ in _groups())])


def own_bytes() -> int:
    """Return the bytes of memory that this process may hold in all: those that it holds now, and those that are free.

    Pages of files that it reads count as free already.
    """
    import psutil

    held = psutil.Process().memory_info()
    return free_bytes() + held.rss - getattr(held, "shared", 0)


def _groups() -> Iterator[tuple[int, int]]:
    return groups(_GROUPS, _OWN_GROUPS.read_text() if _OWN_GROUPS.is_file() else "")


def groups(root: Path, told: str) -> Iterator[tuple[int, int]]:
    """Yield the bytes that each control group with a limit gives to its processes, and those that are free of them.

    `root` is where Linux shows groups, and `told` what it says of a process's own: a line such as "0::/docker/1a2b" for
    version 2, "4:memory:/docker/1a2b" for version 1. A container may not see its group under the name that is told.
    """
    for line in told.splitlines():
        number, kinds, path = line.split(":", 2)
        if number != "0" and "memory" not in kinds.split(","):
            continue
        whole, version = (root, 2) if number == "0" else (root / "memory", 1)
        limit, held, files = _FILES[version]
        own = whole / path.lstrip("/")
        for group in (own, *(each for each in own.parents if each.is_relative_to(whole))):
            try:
                most, now = int((group / limit).read_text()), int((group / held).read_text())
                cached = re.search(rf"^{files} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # no such group, or its limit is "max"
                continue
            yield most, max(0, most - now + (int(cached[1]) if cached else 0))
