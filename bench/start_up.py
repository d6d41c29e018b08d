"""python -m bench.start_up RECIPE [key=value ...] --results FILE: seconds from the command to its first step.

They are compared with what `import unsloth` alone takes in a process of its own, on the same machine in the same call.
The command runs twice, and is stopped after its first step: first with no kernel compiled before, then with what the
first left. The base should be a checkpoint that is quantised already (bench.prequantised) and in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.clock import say
from bench.whole_run import CACHES
from fast_ft.common import environment
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError

MOST_OVER_IMPORT = 15.0  #: seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print its figures; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.start_up", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    parser.add_argument("--module", default="unsloth", help="what is imported alone; default: %(default)s")
    options = parser.parse_intermixed_args(given)
    environment.for_libraries()
    command = shlex.join(["python", "-m", "bench.start_up", *given])
    result: dict[str, Any] = {"kind": "start", **machine.stamp(command), "module": options.module}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            result |= measure(options.recipe, options.overrides, options.module, Path(name))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.results, result)
    print(json.dumps({"imports": result["imports"], "runs": result["runs"]}))
    print(json.dumps({name: value for name, (value, _) in figures(result).items()}))
    return 0


def measure(recipe: str, overrides: Sequence[str], module: str, work: Path) -> dict[str, Any]:
    """Import the module alone three times, run the command twice between them; return the seconds of each."""
    caches = {name: str(work / name) for name in CACHES}
    result: dict[str, Any] = {"first_import": import_seconds(module), "imports": [], "runs": {}}
    for name in ("cold", "warm"):
        result["imports"].append(import_seconds(module))
        words = [recipe, *overrides, f"output_dir={work / 'runs' / name}"]
        result["runs"][name] = first_step(words, work / "runs" / name, work / f"{name}.log", caches)
        say(f"{name}: first step after {result['runs'][name]['total']:.1f} s")
    return result


def import_seconds(module: str) -> float:
    """Return the seconds of a process that imports a module and does nothing else."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"`import {module}` fails here:\n{done.stderr[-2000:]}")
    say(f"import {module}: {time.monotonic() - started:.1f} s")
    return round(time.monotonic() - started, 2)


def first_step(words: Sequence[str], folder: Path, log: Path, variables: Mapping[str, str]) -> dict[str, float]:
    """Run `python -m fast_ft` until its first step is done, stop it, and return its start_up. Raises InputError."""
    manifest = folder / "manifest.json"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fast_ft", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
        )
        try:
            while process.poll() is None:
                found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
                if "start_up" in found:
                    return dict(found["start_up"])
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
    lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    raise InputError(f"the command ended with status {process.returncode} before its first step:\n{lines}")


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}."""
    card, alone = f"start.{machine.slug_of(result)}", statistics.mean(result["imports"])
    total, module = result["runs"]["warm"]["total"], result["module"]
    return {
        f"{card}.first_step_seconds": (round(total, 1), "s, command to first step, kernels compiled before"),
        f"{card}.over_import_seconds": (
            round(total - alone, 1),
            f"s, command to first step less `import {module}` alone; at most {MOST_OVER_IMPORT:g}",
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
