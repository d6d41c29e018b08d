"""python -m bench.whole_run RECIPE [key=value ...] --results FILE: a recipe's whole command, from start to pred.json.

The command runs twice, each time as a user gives it, in a process of its own and into a folder of its own: first
("cold") with empty caches of compiled kernels, then ("warm") with what the first left there. After them bench.decode
steps the run's own pool, over the run's own adapter. For a 7B with random weights, as on a T4:

    python -m bench.whole_run recipes/strong.yaml model.name_or_path=BASE data.train=ROWS data.test=PROMPTS \\
        generate.max_new_tokens=128 budget.memory_gib=14.3 --results bench/results/run-strong-CARD.json

The result holds what both runs planned and recorded, every line in which they ran out of memory, and every training
step. `python -m bench --adopt FILE` takes its figures, named after the card. --answers-only is for a command whose
training is cut short (train.max_steps): its own seconds are no figures, and bench.decode is left out. Where the files
are a copy without their repository, BENCH_COMMIT=HASH in front of the command says which commit they are of.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine, recipe_run
from bench.clock import say
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.hub import download
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")  #: where libraries keep compiled kernels
#: How the manifest says what answering did: its seconds by name, the steps it took, the tokens that its cache held.
SECONDS, STEPS, CACHE = "seconds_by", "decoding_steps", "cache_tokens"
APART = ("loading", "prefill", "steps")  #: names in SECONDS that are no fixed cost
MOST_BENCH_OVER_RUN = 1.1


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print its figures; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.whole_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep run folders and logs there")
    parser.add_argument("--answers-only", action="store_true", help="keep figures of answering only")
    options = parser.parse_intermixed_args(given)
    command = shlex.join(["python", "-m", "bench.whole_run", *given])
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            result = measure(options, command, options.keep or Path(name))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems(result):
        say(f"no figure of decoding: {problem}")
    print(json.dumps({name: value for name, (value, _) in figures(result).items()}))
    return 0


def measure(options: argparse.Namespace, command: str, work: Path) -> dict[str, Any]:
    """Run the command twice and bench.decode once; return the result, which is written after each of them."""
    recipe_path, overrides, results = options.recipe, options.overrides, options.results
    recipe = loader.load_recipe(recipe_path, overrides)
    if recipe.data.test is None:
        raise InputError("data.test: null; the command is measured up to pred.json. Give a file of prompts.")
    caches = {name: str(work / "caches" / name) for name in CACHES}
    for cache in caches.values():
        if Path(cache).exists():
            raise InputError(f"{cache}: kernels were compiled there already. Give another --keep, or delete it.")
        Path(cache).mkdir(parents=True)
    result: dict[str, Any] = {"kind": "run", **machine.stamp(command), "recipe": Path(recipe_path).stem,
                              "answers_only": options.answers_only, "runs": {}}  # fmt: skip
    for name in ("cold", "warm"):
        say(f"{name}: the whole command ...")
        changes = [*overrides, f"output_dir={work / name}"]
        folder, result["runs"][name] = recipe_run.run_command(recipe_path, changes, work / f"{name}.log", caches)
        write_json(results, result)
    if options.answers_only:
        return result
    say("bench.decode with the run's pool ...")
    result["decode"] = decode_as_in(recipe, folder, result["runs"]["warm"], work / "decode.json", caches)
    write_json(results, result)
    return result


def decode_as_in(
    recipe: Recipe, folder: Path, run: dict[str, Any], out: Path, caches: Mapping[str, str]
) -> dict[str, Any]:
    """Return bench.decode's result for the pool, prompts, limit and adapter of a run."""
    model, cap = recipe.model, recipe.budget.memory_gib
    words = [
        "--base", download.model_folder(model.name_or_path, model.revision),
        "--tokenizer", download.tokenizer_folder(model.tokenizer or model.name_or_path, model.revision),
        "--prompts", recipe.data.test, "--adapter", RunDir.at(folder).adapter, "--only", "fixed",
        "--limit", recipe.generate.max_new_tokens, "--take", 10**6, "--cap", 0 if cap == "auto" else cap,
        "--slots", run["generate"]["batch_size"], "--workspace", 0 if run["plan"]["dequantise"] else 96,
        "--dtype", run["train"]["dtype"], "--results", out,
        *(["--cells", cells] if (cells := run["generate"].get(CACHE) or run["plan"]["cache_tokens"]) else []),
    ]  # fmt: skip
    recipe_run.start("bench.decode", [str(word) for word in words], out.with_suffix(".log"), caches)
    measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {key: measured[key] for key in ("date", "measurements")}


def fixed_seconds(run: dict[str, Any]) -> float:
    """Return the seconds of answering that are neither loading, nor prefill, nor steps."""
    answering = run["generate"]
    return float(answering["seconds"] - sum(answering[SECONDS][name] for name in APART))


def steps_per_s(result: dict[str, Any]) -> tuple[float, float]:
    """Return the steps a second of the warm run, and of bench.decode with the same pool (the median of its runs).

    What captures take counts for neither.
    """
    answering = result["runs"]["warm"]["generate"]
    fixed = [each for each in result["decode"]["measurements"] if each["name"] == "fixed"]
    rates = [each["steps"] / (each["burst_seconds"] - each["capture_seconds"]) for each in fixed]
    return answering[STEPS] / answering[SECONDS]["steps"], statistics.median(rates)


def problems(result: dict[str, Any]) -> list[str]:
    """Say why a result makes no figures of decoding: it ran out of memory, or had another pool than the planned one."""
    found = []
    for name, run in result["runs"].items():
        answering, plan = run["generate"], run["plan"]
        if run["out_of_memory"]:
            found.append(f"{name}: out of memory {len(run['out_of_memory'])} times, first: {run['out_of_memory'][0]}")
        if answering["batch_size"] < min(plan["generation_batch"], answering["answers"]):
            found.append(f"{name}: {plan['generation_batch']} slots were planned, {answering['batch_size']} were used")
        if absent := [key for key in (SECONDS, STEPS, CACHE) if key not in answering]:
            found.append(f"{name}: the manifest does not say {', '.join(absent)} of answering")
        elif answering[CACHE] + PAGE <= (plan["cache_tokens"] or 0):
            found.append(f"{name}: a cache of {plan['cache_tokens']} tokens was planned, {answering[CACHE]} were held")
    if result.get("answers_only"):
        return found
    if "decode" not in result:
        found.append("bench.decode did not end")
    elif any(each.get("out_of_memory") for each in result["decode"]["measurements"]):
        found.append("bench.decode: out of memory with the run's pool")
    return found


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: those of decoding only where nothing ran out of memory and the plan was kept."""
    card, runs = f"run.{machine.slug_of(result)}", result["runs"]
    if "warm" not in runs:
        return {}
    what = f"{result['recipe']}.yaml, command to pred.json"
    found: dict[str, tuple[float, str]] = {}
    if not result.get("answers_only"):
        found[f"{card}.seconds"] = (runs["warm"]["pred_seconds"], f"s, {what}, kernels compiled before")
        found[f"{card}.seconds_cold"] = (runs["cold"]["pred_seconds"], f"s, {what}, no kernel compiled before")
    if problems(result):
        return found
    for name in runs:
        before = "no kernel" if name == "cold" else "kernels"
        unit = f"s of answering besides loading, prefill and steps, {before} compiled before"
        found[f"{card}.decode_fixed_seconds_{name}"] = (round(fixed_seconds(runs[name]), 2), unit)
    if result.get("answers_only"):
        return found
    own, bench = steps_per_s(result)
    unit = f"bench.decode's rate of steps over the run's, same pool; at most {MOST_BENCH_OVER_RUN}"
    return found | {f"{card}.decode_bench_over_run": (round(bench / own, 3), unit)}


if __name__ == "__main__":
    sys.exit(main())
