"""python -m bench.former RECIPE [key=value ...] --former TREE --results FILE: this program against a former commit's.

TREE is an unpacked `git archive` of the former commit. Both train the same rows on the same card in the same call, own
blocks and Unsloth's layers: bench.host_share times some steps of each, and profiles a few more. With --commands the
whole command from its start to the adapter is timed too, behind the steps, which have compiled all kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import host_share, machine, step_profile
from bench.clock import say
from bench.emulation import LABEL
from bench.whole_run import CACHES
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError

WAYS = {"fused": "gain", "unsloth": "unsloth_gain"}
WARM_UP = 5  #: steps that are not counted
PROGRAMS = ("now", "former")
Running = tuple[str, str, Path, subprocess.Popen[str]]  #: way, program, where its result comes, its process


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print its figures; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.former", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--former", type=Path, required=True, metavar="TREE", help="the former commit's files")
    parser.add_argument("--former-commit", required=True, metavar="HASH", help="which commit that is")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each, before the profile")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, in turn")
    parser.add_argument("--emulate", choices=["t4"], help=f"{LABEL}: memory, attention, 8 SMs; ratios only")
    parser.add_argument("--commands", type=int, default=0, help="how often to time the command to its adapter")
    options = parser.parse_intermixed_args(given)
    command = shlex.join(["python", "-m", "bench.former", *given])
    result: dict[str, Any] = {"kind": "former", **machine.stamp(command), "former_commit": options.former_commit}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            measure(options, Path(name), result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, (value, _) in figures(result).items()}, indent=1))
    print("\n".join(result["failed"]), file=sys.stderr)
    return 1 if result["failed"] else 0


def measure(options: argparse.Namespace, work: Path, result: dict[str, Any]) -> None:
    """Measure both programs; `result` is written after each part, so that what was measured is kept."""
    trees = {"former": options.former.resolve(), "now": machine.ROOT}
    for name in ("host_share.py", "step_profile.py", "process.py"):  # both sides are timed by the same lines
        shutil.copy(trees["now"] / "bench" / name, trees["former"] / "bench")
    caches = {name: os.environ.get(name, str(work / name)) for name in CACHES}
    result |= {"emulate": options.emulate, "steps": [], "commands": [], "failed": []}
    jobs = [(way, program) for way in options.ways.split(",") for _ in range(options.rounds) for program in PROGRAMS]
    running: list[Running] = []
    try:
        for number, (way, program) in enumerate(jobs):
            out = work / f"{number}.json"
            words = [
                options.recipe, *options.overrides, f"model.backend={way}", "--results", out,
                "--turn", work / f"{number}.go", "--warm", options.steps + 1, "--profiled", 2,
                *(["--emulate", options.emulate] if options.emulate else []),
            ]  # fmt: skip
            running.append((way, program, out, _start(trees[program], "bench.host_share", words, caches, options)))
        # They import beside each other, and then use the card one after the other, while nothing else runs.
        _wait(running, ".ready")
        for number, each in enumerate(running):
            each[2].with_suffix(".go").touch()
            if number:  # it computes its digest while the next one trains
                _collect(running[number - 1], result)
                write_json(options.results, result)
            _wait([each], ".done")
        _collect(running[-1], result)
        write_json(options.results, result)
    finally:
        for *_, process in running:
            process.kill()
    for place in range(options.commands):
        for program in PROGRAMS:
            folder = work / f"run-{program}-{place}"
            words = ["train", options.recipe, *options.overrides, "model.backend=fused", f"output_dir={folder}"]
            began = time.monotonic()
            process = _start(trees[program], "fast_ft", words, caches, options)
            said = process.communicate()[0]
            if process.returncode:
                raise InputError(f"{program}, the command: status {process.returncode}:\n{said[-2000:]}")
            seconds = round(time.monotonic() - began, 2)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            result["commands"].append({
                "program": program, "place": place, "seconds": seconds, "start_up": manifest["start_up"],
                "train": manifest["phases"]["train"], "digests": manifest["digests"],
            })  # fmt: skip
            say(f"{program}: {seconds} s from the command to its adapter")
            write_json(options.results, result)


def _collect(running: Running, result: dict[str, Any]) -> None:
    """Take in what a process measured; one that failed leaves the others."""
    way, program, out, process = running
    said = process.communicate()[0]
    if process.returncode:
        result["failed"].append(f"{program}, {way}: status {process.returncode}: {said[-2000:]}")
        return
    found = json.loads(out.read_text(encoding="utf-8"))
    say(f"{program}, {way}: {statistics.median(found['step_seconds'])} s, the median of its steps")
    if program == "former":  # no figure needs each of its kernels
        found["host_share"] = round(step_profile.host_share(found), 4)
        for name in ("pass", "other", "top"):
            del found[name]
    result["steps"].append({"program": program, "way": way, **found})


def _wait(running: Sequence[Running], what: str) -> None:
    """Wait until all of these have said so, or have ended."""
    while not all(out.with_suffix(what).exists() or process.poll() is not None for _, _, out, process in running):
        time.sleep(0.1)


def _start(
    tree: Path, module: str, words: Sequence[object], caches: Mapping[str, str], options: argparse.Namespace
) -> subprocess.Popen[str]:
    """Start a module of a tree; what else Python finds stays as it is here."""
    others = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each not in ("", ".")]
    path = os.pathsep.join([*others, str(tree)])
    commit = machine.commit() if tree == machine.ROOT else options.former_commit
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)], cwd=tree, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **caches, "PYTHONPATH": path, "BENCH_COMMIT": str(commit)},
    )  # fmt: skip


def tokens_per_s(run: Mapping[str, Any]) -> float:
    """Return the median of a run's steps, the first ones left out, in tokens/s."""
    pairs = list(zip(run["step_tokens"], run["step_seconds"], strict=True))[WARM_UP:]
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: factors over the former commit, and of this one speed and the host's share."""
    card = f"train.{'t4class' if result['emulate'] else machine.slug_of(result)}"
    over, label = f"over commit {result['former_commit'][:7]}", f" ({LABEL})" if result["emulate"] else ""
    found: dict[str, tuple[float, str]] = {}
    now: dict[str, float] = {}
    for way, name in WAYS.items():
        speeds = {
            program: [tokens_per_s(run) for run in result["steps"] if (run["way"], run["program"]) == (way, program)]
            for program in PROGRAMS
        }
        if not all(speeds.values()):
            continue
        now[way] = statistics.median(speeds["now"])
        factor = now[way] / statistics.median(speeds["former"])
        found[f"{card}.{name}"] = (round(factor, 3), f"times as many tokens/s through {way}, {over}{label}")
        profile = [run for run in result["steps"] if (run["way"], run["program"]) == (way, "now")][-1]
        if way == "fused" and not result["emulate"]:
            found |= host_share.figures({**profile, "environment": result["environment"]})
            found[f"{card}.tokens_per_s"] = (round(now[way], 1), "tokens/s, median of the steps")
    if len(now) == len(WAYS):
        unit = f"the tokens/s of Unsloth's layers over those of fused, both in our passes{label}"
        found[f"{card}.unsloth_share"] = (round(now["unsloth"] / now["fused"], 3), unit)
    if result["commands"]:
        took = {
            program: statistics.median(run["seconds"] for run in result["commands"] if run["program"] == program)
            for program in PROGRAMS
        }
        unit = f"times as fast from the command to its adapter, kernels compiled before, {over}"
        found[f"{card}.wall_gain"] = (round(took["former"] / took["now"], 3), unit)
    return found


if __name__ == "__main__":
    sys.exit(main())
