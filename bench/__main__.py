"""python -m bench RECIPE [key=value ...]: measure a recipe on this machine, and keep what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import figures, recipe_run
from fast_ft.atomic import write_json, write_text
from fast_ft.errors import InputError


def main() -> int:
    """Run one measurement, or render the README's table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="a recipe; its run folders must not be there yet")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--backends", default=",".join(recipe_run.BACKENDS), help="default: %(default)s")
    parser.add_argument("--name", help="the result's name: NAME-BACKEND.json; default: the recipe's")
    parser.add_argument("--results", type=Path, default=figures.RESULTS, help="folder for results and logs")
    parser.add_argument("--readme", action="store_true", help="render README.md's table from figures.json")
    parser.add_argument(
        "--adopt", type=Path, metavar="JSON", help="take a result from another machine into figures.json"
    )
    options = parser.parse_intermixed_args()
    try:
        if options.readme:
            readme = figures.RESULTS.parents[1] / "README.md"
            write_text(readme, figures.render_readme(readme))
        elif options.adopt:
            adopt(options.adopt)
        elif options.recipe:
            measure(options)
        else:
            parser.error("a recipe, --readme or --adopt is needed")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Measure the recipe through each backend, one NAME-BACKEND.json each, and print one JSON line each."""
    name = options.name or Path(options.recipe).stem
    for backend in options.backends.split(","):
        log = options.results / "logs" / f"{name}-{backend}.log"
        result = recipe_run.measure(options.recipe, options.overrides, backend, log)
        write_json(options.results / f"{name}-{backend}.json", result)
        print(json.dumps({"name": f"{name}-{backend}", **{key: value for key, (value, _) in headline(result).items()}}))


def adopt(path: Path) -> None:
    """Put the headline figures of a result in bench/results/ into figures.json."""
    if path.parent.resolve() != figures.RESULTS.resolve():
        raise InputError(f"{path}: put it into {figures.RESULTS} first, for figures.json points at it by name")
    result = json.loads(path.read_text(encoding="utf-8"))
    card = (result["environment"]["gpu"] or {"name": "CPU"})["name"]
    values = {f"recipe.{path.stem}.{key}": value for key, value in headline(result).items()}
    figures.record(values, card=card, command=result["command"], source=path.name)


def headline(run: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)} of one result, computed from its raw steps."""
    train, generate = run["train"], run["generate"]
    later = run["steps"][len(run["steps"]) // 2 :]  # the second half: nothing compiles there any more
    speed = sum(step["tokens"] for step in later) / sum(step["seconds"] for step in later)
    return {
        "minutes": (round(run["wall_seconds"] / 60, 2), "min, command to pred.json"),
        "train_tokens_per_s": (round(speed, 1), "tokens/s, second half of the steps"),
        "train_peak_gib": (train["peak_gib"], "GiB reserved"),
        "decode_tokens_per_s": (round(generate["new_tokens"] / generate["decoding_seconds"], 1), "new tokens/s"),
        "adapter_in_plain_peft_nats": (run["adapter_in_plain_peft_nats"], "nat a token, mean difference"),
    }


if __name__ == "__main__":
    sys.exit(main())
