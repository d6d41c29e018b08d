"""python -m bench.quickstart: run the quickstart as a reader would; keep output and scores for docs/quickstart.md."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import figures, machine, recipe_run
from fast_ft.common.atomic_files import write_json
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import output_folder

RECIPE = "recipes/quickstart.yaml"
SHOWN = ("crop_by_capital", "difference", "land", "sort", "story", "sum", "all")  #: rows of the table that are shown


def main() -> int:
    """Run it and write bench/results/quickstart.json."""
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "run", Path(name) / "log"
        started = time.monotonic()
        recipe_run.start("fast_ft", [RECIPE, f"output_dir={folder}"], log, {"COLUMNS": "80", "NO_COLOR": "1"})
        seconds = time.monotonic() - started
        result = {
            "kind": "quickstart",
            **machine.stamp("python -m bench.quickstart"),
            "load_before": round(busy, 1),
            "wall_seconds": round(seconds, 1),
            "output": output_lines(log.read_text(encoding="utf-8"), folder),
            "scores": {key: value for key, value in scores(folder).items() if key != "prompts"},
        }
    write_json(figures.RESULTS / "quickstart.json", result)
    return 0


def scores(folder: Path) -> dict[str, Any]:
    """Return a run's scores.json."""
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def output_lines(text: str, folder: Path) -> list[str]:
    """The output's lines, with the folder's name as the recipe gives it."""
    usual = output_folder(load_recipe(RECIPE), RECIPE)
    return text.replace(str(folder), str(usual)).splitlines()


def markdown(result: dict[str, Any]) -> str:
    """Return the excerpt of docs/quickstart.md: what was run, when and how long it took, and most of the output."""
    about = f"{result['cores']} CPU cores, {result['date'][:10]}"
    if result["load_before"] > result["cores"]:
        about += ", beside other work that kept them busy"
    seconds = f"{result['wall_seconds']:.0f} s"
    lines = [f"`make quickstart`, some lines left out ({about}; {seconds} after installation):", ""]
    text = "\n".join(lines + [f"    {line}".rstrip() for line in excerpt(result["output"])])
    return re.sub(r"runs/quickstart-[0-9a-f]{8}", "runs/quickstart-xxxxxxxx", text)  # another one for each setting


def excerpt(output: list[str]) -> list[str]:
    """Leave out all but each bar's last line, and most rows of the table of scores."""
    kept: list[str] = []
    for index, line in enumerate(output):
        following = output[index + 1] if index + 1 < len(output) else ""
        if (title := _bar(line)) and title == _bar(following):
            continue
        row = re.match(r"│ (\w+)", line)
        if row and row[1] not in SHOWN and "%" in line:
            continue
        kept.append(line)
    return kept


def _bar(line: str) -> str:
    """The title of a bar's line, such as "training  87/127  ..."; "" for another line."""
    found = re.match(r"([a-z ]+?)  +\d+/\d+  ", line)
    return found[1] if found else ""


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.quickstart", description=__doc__).parse_args()
    raise SystemExit(main())
