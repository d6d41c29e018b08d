"""What a measurement lacks of what a figure should rest on: a commit, one program, two runs, samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

RUNS = 2  #: that a figure of time should rest on
COMMIT = re.compile(r"[0-9a-f]{7,40}")


def _fixed(result: dict[str, Any]) -> int:
    return sum(each["name"] == "fixed" and "tokens" in each for each in result["measurements"])


def _least(ran: Iterable[Hashable]) -> int:
    """Return how often that ran which ran least often."""
    return min(Counter(ran).values(), default=0)


def _finals(result: dict[str, Any]) -> int:
    return _least(part["way"] for parts in result["setups"].values() for part in parts["finals"])


def _commands(result: dict[str, Any]) -> int:
    return _least((run["way"], run["turn"]) for run in result["runs"])


#: How often a kind of result ran what its figures of time are of. Kinds that measure no time are left out.
TIMED: dict[str, Callable[[dict[str, Any]], int]] = {
    "decode": _fixed,
    "decode-cpu": lambda result: len(result["runs"]),
    "peers": _finals,
    "whole": _commands,
    **dict.fromkeys(("train", "run", "start", "export", "recipe", "sweep-cards", "sweep-pocket"), lambda _: 1),
}
OTHERS = ("published-t4",)  #: measured by others, who are named with their sources


def lacks(result: dict[str, Any]) -> list[str]:
    """Return what a result lacks, in words; nothing for a figure as it should be."""
    kind = result.get("kind", "recipe" if "backend" in result else "")
    if kind in OTHERS:
        return []
    found = []
    commits = str(result.get("commit")).split("; ")
    if not all(COMMIT.fullmatch(each) for each in commits):
        found.append("a commit")
    if len(programs(result)) > 1:
        found.append("one program")
    if kind in TIMED and TIMED[kind](result) < RUNS:
        found.append("a second run")
    return found


def programs(result: dict[str, Any]) -> set[str]:
    """Return the digests of fast_ft's program that measured the parts of a training result."""
    if result.get("kind") != "train":
        return set()
    ours = ("fast_ft", "fast_ft-unsloth")
    return {
        parts[way]["program"] for parts in result["setups"].values() for way in ours if "program" in parts.get(way, {})
    }
