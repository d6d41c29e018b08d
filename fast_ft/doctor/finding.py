"""One thing that the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["fine", "note", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """`level`: fine; note: good to know; warning: a run may suffer; broken: a run would fail. `remedy`: what to do."""

    name: str
    level: Level
    text: str
    remedy: str = ""
