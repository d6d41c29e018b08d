"""What a training session's steps become: lines of the log, and the text beside the bar."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.pipeline.train_recorder import SMOOTHED, Recorder
from fast_ft.run.folder import RunDir, now


class Texts:
    """A bar that keeps its texts."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def advance(self, by: int = 1, facts: str = "") -> None:
        self.given.append(facts)


def test_the_bar_shows_the_mean_loss_of_the_last_steps(tmp_path: Path) -> None:
    bar: Any = Texts()
    content = {"recipe": {}, "recipe_file": "a.yaml", "recipe_digest": "0" * 64, "started": now(), "phases": {}}
    atomic_files.write_json(tmp_path / "manifest.json", content)
    with atomic_files.Lines(tmp_path / "log.jsonl") as log:
        recorder = Recorder(RunDir(tmp_path), None, log, [], bar, Stopwatch())  # type: ignore[arg-type]
        for loss in [9.0, *[1.0, 3.0] * (SMOOTHED // 2), math.nan]:
            line = {"stage": "all", "step": 1, "loss": loss, "tokens": 8, "seconds": 1.0, "gib": None}
            recorder.add_step(line)
        recorder.add_step(line | {"seconds": 0.001, "loss": 1.0})
    assert bar.given[0].startswith("all  mean loss 9.000  8 tokens/s")
    assert "mean loss 2.000" in bar.given[SMOOTHED], "each step's loss alone jumps between 1 and 3"
    assert "mean loss 2.111" in bar.given[-2], "a step without a finite loss counts nowhere"
    assert "  9 tokens/s" in bar.given[-1], "80 tokens in 9.001 s: one step's seconds alone jump, too"
