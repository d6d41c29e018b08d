"""python -m bench.sweep pocket | cards RECIPE | start RECIPE: what a sweep finds, and what it costs.

pocket: a sweep of recipes/sweep-pocket.yaml, then its best recipe against the recipe itself on the 300 fresh prompts.
cards: the same trials with one worker and with two; python -m bench --adopt takes its figures.
start: a trial after others in one process against a fresh one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import figures, machine
from fast_ft.common.atomic_files import write_json
from fast_ft.judge import statistics
from fast_ft.judge.scoring import scores_of
from fast_ft.pipeline.rerun import generate_again, judge_again
from fast_ft.recipe.loader import load_recipe

RECIPE = "recipes/sweep-pocket.yaml"
MINUTES = 5.0
SEED = 3407
POCKET = "fast_ft/pocket"


def main() -> int:
    """Run one measurement and print its JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("what", choices=("pocket", "cards", "start"))
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, default=figures.RESULTS)
    parser.add_argument("--name", default="sweep-cards")
    options = parser.parse_intermixed_args()
    if options.what == "pocket":
        result = pocket()
        write_json(options.results / "sweep-pocket.json", result)
        figures.record(headline(result), result, source="sweep-pocket.json")
    else:
        result = {"cards": cards, "start": start}[options.what](options.recipe, options.overrides)
        write_json(options.results / f"{options.name}.json", result)
    print(json.dumps(result if options.what == "start" else headline(result)))
    return 0


def pocket() -> dict[str, Any]:
    """Sweep, and answer the fresh prompts, which no trial and no choice saw, with the recipe's adapter and the best."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "sweep"
        seconds, sweep = run_sweep(RECIPE, root, "--hours", str(MINUTES / 60))
        best, own = sweep["best"], next(t for t in sweep["trials"] if t["number"] == 0)
        fresh = {
            name: fresh_scores(Path(where)) for name, where in (("best", best["folder"]), ("recipe", own["folder"]))
        }
    return {
        "kind": "sweep-pocket",
        **machine.stamp("python -m bench.sweep pocket"),
        "wall_seconds": seconds,
        "allowed_seconds": 60 * MINUTES,
        "validation_against_recipe": best["against_recipe"],
        "trials": [{key: t.get(key) for key in ("number", "point", "value", "state", "seconds", "priced", "minutes")}
                   for t in sweep["trials"]],
        "fresh": fresh,
    }  # fmt: skip


def fresh_scores(run: Path) -> dict[str, float | None]:
    """Answer the fresh prompts with a trial's adapter and decoding, and return each prompt's score."""
    generate_again(run, [f"data.test={POCKET}/fresh.json"])
    judged = judge_again(run, [f"data.test={POCKET}/fresh.json", f"judge.references={POCKET}/fresh_references.json"])
    return scores_of(json.loads(judged.scores.read_text(encoding="utf-8")))


def cards(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Do a grid of trials with one worker, then with two; each command whole, imports and loading included."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            root = Path(folder) / str(workers)
            seconds, sweep = run_sweep(recipe, root, "--workers", str(workers), *overrides)
            kept = ("number", "point", "value", "worker", "seconds", "took", "times", "minutes")
            trials = [{key: t.get(key) for key in kept} for t in sweep["trials"] if t["state"] == "finished"]
            runs[str(workers)] = {"wall_seconds": seconds, "trials": trials}
            print(json.dumps({"workers": workers, **runs[str(workers)]}), file=sys.stderr, flush=True)
    command = " ".join(["python -m bench.sweep cards", recipe, *overrides])
    return {"kind": "sweep-cards", **machine.stamp(command), "runs": runs}


def run_sweep(recipe: str, root: Path, *words: str) -> tuple[float, dict[str, Any]]:
    """Run the command and return its seconds and sweep.json's content."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "fast_ft", "sweep", recipe, "--output", str(root), *words], check=True, stdout=sys.stderr
    )
    seconds = time.monotonic() - started
    return round(seconds, 1), json.loads((root / "sweep.json").read_text(encoding="utf-8"))


def start(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Return the first losses and gradient norms of a trial that comes after two others, of its r and of another.

    Each also from a fresh process. `overrides` are the trial's; the other has twice its lora.r.
    """
    base = load_recipe(recipe, overrides)
    other = [*overrides, f"lora.r={2 * base.lora.r}"]
    plans = {"kept": [overrides, overrides, other, overrides], "fresh": [overrides], "fresh_other": [other]}
    found: dict[str, Any] = {}
    for name, trials in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            code = "import sys, json; from bench.sweep import in_one_process; in_one_process(*json.loads(sys.argv[1]))"
            words = [sys.executable, "-c", code, json.dumps([recipe, trials, folder])]
            out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name] = json.loads(out.splitlines()[-1])
    return found


def in_one_process(recipe: str, trials: list[list[str]], folder: str) -> None:
    """Train each recipe over one kept base model, and print the first steps of each as JSON."""
    from fast_ft.sweep.trial_runner import TrialRunner
    from fast_ft.sweep.trial_task import TrialTask

    runner, first = TrialRunner(), []
    for number, overrides in enumerate(trials):
        root = Path(folder) / str(number)
        each = load_recipe(recipe, [*overrides, f"output_dir={root}"])
        untested = each.model_copy(update={"data": each.data.model_copy(update={"test": None})})
        result = runner.run(TrialTask(untested, recipe))
        assert result.problem is None, result.problem
        lines = [json.loads(line) for line in (root / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        first.append(
            {"r": each.lora.r, "times": result.times, "loss": [line["loss"] for line in lines[:3]],
             "grad_norm": [line["grad_norm"] for line in lines[:3]]}
        )  # fmt: skip
    print(json.dumps(first))


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}, computed from the raw scores and times."""
    if result["kind"] == "sweep-pocket":
        fresh = result["fresh"]
        gain = statistics.compare(fresh["best"], fresh["recipe"], SEED, "the recipe")
        tried = sum(t["state"] == "finished" for t in result["trials"])
        unit = f"share of exact matches, low end of the paired 95 % interval, {gain['count']} fresh prompts"
        return {
            "sweep.gain_over_recipe": (gain["low"], unit),
            "sweep.pocket_minutes": (
                round(result["wall_seconds"] / 60, 2),
                f"min, {tried} trials, at most {MINUTES:g}",
            ),
        }
    one, two = (result["runs"][key] for key in ("1", "2"))
    share = two["wall_seconds"] / one["wall_seconds"]
    pairs = gaps(one["trials"])
    return {
        f"sweep.{machine.slug_of(result)}.two_gpu_time_share": (
            round(share, 3),
            f"of one card's time, {len(one['trials'])} trials, whole command",
        ),
        f"sweep.{machine.slug_of(result)}.second_trial_start_s": (
            round(pairs[0]["without_answers"], 2),
            "s from the first trial's last step to the second's first, the first's answers taken off",
        ),
    }


def gaps(trials: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return, for trials one after another in one worker, the seconds between training and training.

    `answers`: the part in which the earlier one's prompts were answered.
    """
    ordered = sorted((t for t in trials if t["times"]), key=lambda t: t["times"]["trained"])
    found = []
    for before, after in itertools.pairwise(ordered):
        gap = after["times"]["first_step"] - before["times"]["trained"]
        answers = before["seconds"]["answer"]
        found.append({"gap": gap, "answers": answers, "without_answers": gap - answers})
    return found


if __name__ == "__main__":
    sys.exit(main())
