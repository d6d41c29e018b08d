"""python -m bench.smollm: run recipes/smollm.yaml as a reader would; keep scores and answers, before and after.

`make smollm` comes first. All 24 held-out questions are kept with both answers, so that whoever reads a share can read
what it is the share of.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import figures, machine, recipe_run
from fast_ft.common.atomic_files import write_json

RECIPE = "recipes/smollm.yaml"


def main() -> int:
    """Run it and write bench/results/smollm.json."""
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "run", Path(name) / "log"
        started = time.monotonic()
        recipe_run.start("fast_ft", [RECIPE, f"output_dir={folder}"], log, {"COLUMNS": "80", "NO_COLOR": "1"})
        result = {
            "kind": "smollm", **machine.stamp("python -m bench.smollm"), "load_before": round(busy, 1),
            "wall_seconds": round(time.monotonic() - started, 1), "answers": answers(folder),
        }  # fmt: skip
    write_json(figures.RESULTS / "smollm.json", result)
    print({key: value for key, (value, _) in headline(result).items()})
    return 0


def answers(folder: Path) -> list[dict[str, Any]]:
    """Return each question with both answers, and whether each has the manner."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    tuned, base, scores = read("pred.json"), read("base_pred.json"), read("scores.json")
    return [
        {
            "question": each["input"][-1]["content"],
            "base": base[key]["output"][0], "tuned": each["output"][0],
            "base_score": scores["base"]["prompts"][key], "tuned_score": scores["prompts"][key],
        }
        for key, each in tuned.items()
    ]  # fmt: skip


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}, computed from the answers' own scores."""

    def mean(side: str, what: str) -> float:
        return round(statistics.fmean(float(each[f"{side}_score"][what]) for each in result["answers"]), 4)

    unit = f"share of {len(result['answers'])} answers"
    return {
        "smollm.cpu.base_in_manner": (mean("base", "matches"), unit),
        "smollm.cpu.tuned_in_manner": (mean("tuned", "matches"), unit),
        "smollm.cpu.base_chrf": (mean("base", "chrf"), "chrF to the references, 0 to 1"),
        "smollm.cpu.tuned_chrf": (mean("tuned", "chrf"), "chrF to the references, 0 to 1"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
