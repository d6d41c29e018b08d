"""Where, when and by which program a measurement was made. Every raw result says so; figures copy it from there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from fast_ft.common.gpu import card_slug
from fast_ft.run import provenance
from fast_ft.run.folder import now

ROOT = Path(__file__).parents[1]
_PROGRAM = ("fast_ft", "bench/*.py", "bench/recipes", "recipes")  #: what a measurement depends on


def stamp(command: str) -> dict[str, Any]:
    """Return what every raw result begins with: the command, the time, the program's commit, and the machine."""
    return {
        "command": command,
        "date": now(),
        "commit": commit(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "environment": provenance.describe(),
    }


def commit() -> str | None:
    """Return the program's commit, with "+changes" where files differ from it; None where there is no repository.

    The environment variable BENCH_COMMIT names it for a copy of the files without their repository.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    hash_, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *_PROGRAM)
    if not hash_ or changes is None:
        return None
    return hash_ + ("+changes" if changes else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def card_of(result: dict[str, Any]) -> str:
    """Return the name of a result's card, as its driver says it; without a card "CPU, 2 cores"."""
    if gpu := result["environment"]["gpu"]:
        return str(gpu["name"])
    cores = result.get("cores")
    return f"CPU, {cores} cores" if cores else "CPU"


def slug_of(result: dict[str, Any]) -> str:
    """Return the card's short name for the names of figures: h200, h100, t4, rtx-4090; cpu without a card."""
    return card_slug(result["environment"]["gpu"]["name"]) if result["environment"]["gpu"] else "cpu"
