"""How many minutes a run has taken: the one answer that `runs`, the report and the ledger of attempts give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fast_ft.run.manifest import Manifest


def step_minutes(lines: Iterable[Mapping[str, Any]]) -> float:
    """Return the minutes of all training steps in log.jsonl's lines, of a stopped training too."""
    return sum(line.get("seconds") or 0.0 for line in lines) / 60


def run_minutes(manifest: Manifest, lines: Iterable[Mapping[str, Any]]) -> float:
    """Return the minutes of a run's finished phases, and of the steps of a training that has not finished."""
    finished = sum(phase.seconds for phase in manifest.phases.values()) / 60
    return finished if "train" in manifest.phases else finished + step_minutes(lines)


def shown(minutes: float) -> str:
    """Return minutes as text, with one decimal: "0.1" is the least that anything takes."""
    return f"{max(minutes, 0.1) if minutes > 0 else 0:.1f}"
