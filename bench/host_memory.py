"""python -m bench.host_memory RECIPE [key=value ...] --results FILE: the host memory of a recipe's whole command.

Memory of the processes' own (anonymous and shared, by /proc) counts, and pages of files do not: the system takes these
back when it needs room. The command runs in a control group of --limit GiB where this machine lets us make one, so that
it also shows whether it gets by with so much. On Colab 12 GB are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.clock import say
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError

MOST_GIB = 10e9 / 2**30
_GROUP = Path("/sys/fs/cgroup/fast_ft_bench")
_EVERY = 0.1  #: seconds between two looks


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print its figure; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    parser.add_argument("--limit", type=float, default=MOST_GIB, help="GiB of the control group; 0: none")
    options = parser.parse_intermixed_args(given)
    command = shlex.join(["python", "-m", "bench.host_memory", *given])
    result: dict[str, Any] = {"kind": "host", **machine.stamp(command), "recipe": Path(options.recipe).stem}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            result |= measure([options.recipe, *options.overrides], Path(name), options.limit)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.results, result)
    print(json.dumps({key: result[key] for key in ("limit_gib", "peaks", "peak_with_files_gib")}))
    print(json.dumps({name: value for name, (value, _) in figures(result).items()}))
    return 0


def measure(words: Sequence[str], work: Path, limit_gib: float) -> dict[str, Any]:
    """Run `python -m fast_ft` and look at its memory until it ends.

    Return {limit_gib, or None where no limit could be set; peaks: GiB by the phase in hand; samples: one a second}.
    """
    folder, log = work / "run", work / "run.log"
    samples: list[dict[str, Any]] = []
    with limited(limit_gib) as group, log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _START,
                str(group / "cgroup.procs" if group else ""),
                *words,
                f"output_dir={folder}",
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        started = time.monotonic()
        while process.poll() is None:
            now = tree_gib(process.pid)
            samples.append({"at": round(time.monotonic() - started, 1), "phase": _phase(folder)} | now)
            time.sleep(_EVERY)
    if process.returncode:
        lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise InputError(f"the command ended with status {process.returncode}:\n{lines}")
    phases = dict.fromkeys(sample["phase"] for sample in samples)
    return {
        "limit_gib": round(limit_gib, 2) if group else None,
        "peaks": {phase: max(s["own_gib"] for s in samples if s["phase"] == phase) for phase in phases},
        "peak_with_files_gib": max(sample["with_files_gib"] for sample in samples),
        "samples": samples[:: round(1 / _EVERY)],
    }


#: A process that joins the control group, if there is one, and becomes `python -m fast_ft`.
_START = """
import os, sys
if sys.argv[1]:
    open(sys.argv[1], "w").write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fast_ft", *sys.argv[2:]])
"""


@contextlib.contextmanager
def limited(gib: float) -> Iterator[Path | None]:
    """Give a control group that may hold this much memory, and no swap; None where none can be made."""
    try:
        if not gib:
            raise OSError("no limit is wanted")
        _GROUP.mkdir()
        (_GROUP / "memory.max").write_text(str(int(gib * 2**30)))
        with contextlib.suppress(OSError):
            (_GROUP / "memory.swap.max").write_text("0")
    except OSError as error:
        say(f"no control group: {error}")
        with contextlib.suppress(OSError):
            _GROUP.rmdir()
        yield None
        return
    try:
        yield _GROUP
    finally:
        with contextlib.suppress(OSError):
            _GROUP.rmdir()


def tree_gib(pid: int) -> dict[str, float]:
    """Return the memory of a process and all below it, in GiB: their own, and with the pages of files they look at."""
    own = files = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text(encoding="utf-8").splitlines()
            )
            kib = {name: int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem", "RssFile")}
            own += kib["RssAnon"] + kib["RssShmem"]
            files += kib["RssFile"]
    return {"own_gib": round(own / 2**20, 3), "with_files_gib": round((own + files) / 2**20, 3)}


def _tree(pid: int) -> list[int]:
    found, left = [], [pid]
    while left:
        each = left.pop()
        found.append(each)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                children = (task / "children").read_text(encoding="ascii")
                left += [int(child) for child in children.split()]
    return found


def _phase(folder: Path) -> str:
    """Return which phase a run is in: before, training or answering."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return "before"
    done = json.loads(manifest.read_text(encoding="utf-8"))
    if "train" in done["phases"]:
        return "answering"
    return "training" if "start_up" in done else "loading"


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}."""
    under = f"under a limit of {result['limit_gib']} GiB" if result["limit_gib"] else "no limit was set"
    unit = f"GiB of the processes' own memory at most, {result['recipe']}.yaml, command to its end; {under}"
    return {"load.host_gib": (round(max(result["peaks"].values()), 2), unit)}


if __name__ == "__main__":
    sys.exit(main())
