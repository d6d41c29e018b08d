"""python -m bench.smollm: run recipes/smollm.yaml as a reader would; keep scores and answers, before and after.

`make smollm` comes first. All 24 held-out questions are kept with both answers, so that whoever reads a share can read
what it is the share of.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import figures, machine, recipe_run
from fast_ft.common.atomic_files import write_json

RECIPE = "recipes/smollm.yaml"


def main() -> int:
    """Run it, or read a finished run, and write bench/results/smollm.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.smollm", description=__doc__)
    parser.add_argument("--run", type=Path, help="the folder of a finished run: nothing is run, and no time is kept")
    options = parser.parse_args()
    stamp = machine.stamp(shlex.join(["python", "-m", "bench.smollm", *(["--run", "RUN_DIR"] if options.run else [])]))
    result = {"kind": "smollm", **stamp, **(_read(options.run) if options.run else _run())}
    write_json(figures.RESULTS / "smollm.json", result)
    print({key: value for key, (value, _) in headline(result).items()})
    return 0


def _run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, log, busy = Path(name) / "run", Path(name) / "log", os.getloadavg()[0]
        started = time.monotonic()
        recipe_run.start("fast_ft", [RECIPE, f"output_dir={folder}"], log, {"COLUMNS": "80", "NO_COLOR": "1"})
        seconds = time.monotonic() - started
        return {"load_before": round(busy, 1), "wall_seconds": round(seconds, 1), "answers": answers(folder)}


def _read(folder: Path) -> dict[str, Any]:
    return {"load_before": None, "wall_seconds": None, "answers": answers(folder)}


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


def markdown(result: dict[str, Any], shown: int = 6) -> str:
    """Return a table of the first answers, before and after; what a table cannot hold is written as in HTML."""
    lines = ["| question | SmolLM2 | tuned |", "|---|---|---|"]
    for each in result["answers"][:shown]:
        cells = (each["question"], _cut(each["base"]), each["tuned"])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cut(text: str, most: int = 160) -> str:
    """Return the words of a text that fit, and three dots where there are more."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def _cell(text: str) -> str:
    return re.sub(r"\s*\n+\s*", "<br>", text.strip().replace("|", "&#124;").replace("<", "&lt;"))


if __name__ == "__main__":
    raise SystemExit(main())
