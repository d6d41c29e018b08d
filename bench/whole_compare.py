"""python -m bench.whole_compare [RECIPE] [key=value ...] --ways WAYS --results FILE: whole commands, ours and peers'.

Each command runs twice in a process of its own, from its start to the adapter and to pred.json: first with empty caches
of compiled kernels, as on a new machine, then with what the first run left there. fast_ft runs through its own blocks
and through Unsloth's layers; peers, the best of bench.best_peer's result, train on the same rows as often and answer
the same prompts. `python -m bench --adopt FILE` takes the figures, which are against the peer that was fastest.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import emulation, machine, ours, process, training
from bench.clock import say
from bench.peer_table import PEERS
from bench.whole_run import CACHES
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.data import dataset
from fast_ft.data.encoding import load_encoder
from fast_ft.recipe import loader
from fast_ft.run.folder import now

RECIPE = str(Path(__file__).parent / "recipes" / "first-100.yaml")
TURNS = ("cold", "warm")


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result after each command, print its figures; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.whole_compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--at-once", type=int, default=32, help="answers in a batch of a peer's")
    parser.add_argument("--cap", type=float, default=emulation.T4_GIB, help="GiB, context included")
    parser.add_argument("--ways", required=True, type=_ways, help="ours and peers', in order, separated by commas")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_intermixed_args(given)
    if "=" in options.recipe:
        options.recipe, options.overrides = RECIPE, [options.recipe, *options.overrides]
    command = shlex.join(["python", "-m", "bench.whole_compare", *given])
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            result = measure(options, command, Path(name))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, (value, _) in figures(result).items()}))
    return 0


def _ways(names: str) -> list[str]:
    """Return the ways that are named. Raises ArgumentTypeError for one that there is not."""
    ways, known = names.split(","), (*ours.WAYS, *PEERS)
    if unknown := [way for way in ways if way not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return ways


def measure(options: argparse.Namespace, command: str, work: Path) -> dict[str, Any]:
    """Run each command cold and warm, one after the other; return the result."""
    recipe = loader.load_recipe(options.recipe, options.overrides)
    if recipe.data.test is None:
        raise InputError("data.test: null; commands are measured up to pred.json. Give a file of prompts.")
    settings, rows = training.describe(recipe)
    result: dict[str, Any] = {
        "kind": "whole", **machine.stamp(command),
        "peers": {way: PEERS[way].about for way in options.ways if way in PEERS}, "answers_at_once": options.at_once,
        "settings": settings, "limit": recipe.generate.max_new_tokens, "runs": [],
    }  # fmt: skip
    order = training.Order(
        options.results, options.recipe, options.overrides, training.Setup("whole", options.cap), 900, True, command
    )
    prompts = dataset.load_prompts(recipe.data.test)[0]
    encoder = load_encoder(recipe.model)
    job = training.job_of(order, recipe, settings) | {
        "rows": rows, "adapter": None, "stop_after": settings["schedule_steps"],
        "unwatched": True, "limit": recipe.generate.max_new_tokens, "answers_at_once": options.at_once,
        "prompts": {prompt.id: encoder.prompt_ids(prompt.messages) for prompt in prompts},
    }  # fmt: skip
    for way in options.ways:
        for turn in TURNS:
            folder = work / f"{way}-{turn}"
            words = _peer_words(job | {"way": way}, folder) if way in PEERS else _our_words(options, way, folder)
            caches = {name: str(work / "caches" / way / name) for name in CACHES}
            log = options.results.parent / "logs" / f"{options.results.stem}-{way}-{turn}.log"
            result["runs"].append({"way": way, "turn": turn, **timed(words, folder, log, caches)})
            result["date"] = now()
            write_json(options.results, result)
            say(json.dumps(result["runs"][-1]))
    return result


def _our_words(options: argparse.Namespace, way: str, folder: Path) -> list[str]:
    more = [*ours.WAYS[way], f"output_dir={folder}", f"budget.memory_gib={options.cap}"]
    return [sys.executable, "-m", "fast_ft", options.recipe, *options.overrides, *more]


def _peer_words(job: dict[str, Any], folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    file = folder / "job.json"
    file.write_text(json.dumps(job | {"work": str(folder)}), encoding="utf-8")
    return [sys.executable, "-m", "bench.peer_command", str(file)]


def timed(words: Sequence[str], folder: Path, log: Path, caches: dict[str, str]) -> dict[str, float]:
    """Run a command that makes a run folder; return the seconds to its adapter, to pred.json, and to its end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, started = time.time(), time.monotonic()
    status = process.run_process(words, log, 900, more=caches)
    seconds = time.monotonic() - started
    weights, pred = folder / "adapter" / "adapter_model.safetensors", folder / "pred.json"
    if status or not pred.is_file():
        lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise InputError(f"{shlex.join(words[1:4])} ended with status {status}; {log} ends with:\n{lines}")
    return {
        "adapter_seconds": round(weights.stat().st_mtime - began, 2),
        "pred_seconds": round(pred.stat().st_mtime - began, 2),
        "seconds": round(seconds, 2),
        "answers": len(json.loads(pred.read_text(encoding="utf-8"))),
    }


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: the fastest peer's time over ours, to pred.json, the first and the second time.

    Of a way that ran more than once it is the mean.
    """
    card, found = f"run.{machine.slug_of(result)}", {}
    times: dict[tuple[str, str], list[float]] = {}
    for run in result["runs"]:
        times.setdefault((run["way"], run["turn"]), []).append(run["pred_seconds"])
    seconds = {key: statistics.mean(each) for key, each in times.items()}
    names = {"fast_ft": "vs_best_peer", "fast_ft-unsloth": "unsloth_layers_vs_best_peer"}
    steps, prompts = result["settings"]["schedule_steps"], result["runs"][0]["answers"]
    what = f"{steps} steps and {prompts} answers of {result['limit']} tokens"
    for turn in TURNS:
        theirs = {peer: seconds[peer, turn] for peer in result["peers"] if (peer, turn) in seconds}
        if not theirs:
            continue
        best = min(theirs, key=lambda peer: theirs[peer])
        before = "no kernel" if turn == "cold" else "kernels"
        unit = (
            f"the time of {best} ({result['peers'][best]}), the fastest of {len(theirs)} peers, over ours, command to "
            f"pred.json, {what}, {before} compiled before"
        )
        for way, name in names.items():
            if mine := seconds.get((way, turn)):
                found[f"{card}.{name}" + ("_cold" if turn == "cold" else "")] = (round(theirs[best] / mine, 3), unit)
    return found


if __name__ == "__main__":
    sys.exit(main())
