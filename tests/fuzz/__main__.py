"""Coverage-guided fuzzing of the parsers: python -m tests.fuzz --minutes 60 (needs requirements-soak.txt).

Each target of targets.py gets an equal share of the time in a process of its own. Prints one JSON line; exit
status 1 where anything but InputError came out, or a process took more than 1 GiB. A file that did it is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

MOST_MIB = 1024
LONGEST = 60  #: seconds for one file


def child(name: str, seconds: int, corpus: Path, found: Path) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fast_ft"]):
        from tests.fuzz import targets as fuzz_targets

    for number, seed in enumerate(fuzz_targets.SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, most)
        return fuzz_targets.changed(data, random.Random(seed))[:most]

    options = {
        "max_total_time": seconds, "rss_limit_mb": MOST_MIB, "timeout": LONGEST, "max_len": 100_000,
        "print_final_stats": 1, "artifact_prefix": f"{found}/{name}-", "verbosity": 0,
    }  # fmt: skip
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)]
    atheris.Setup(arguments, lambda data: fuzz_targets.run(name, data) and None, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, found: Path) -> dict[str, Any]:
    """Return {"inputs", "peak_mib", "clean"} of one target's process; its last words go to stderr where it is not."""
    with tempfile.TemporaryDirectory() as corpus:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--child", name, "--seconds", str(seconds), "--corpus", corpus,
             "--found", str(found)],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    if done.returncode != 0:
        print(done.stderr[-4000:], file=sys.stderr)
    return {
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "peak_mib": int(stats.get("peak_rss_mb", 0)),
        "clean": done.returncode == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--targets", nargs="+", help="default: all")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for files that did harm")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seconds, options.corpus, options.found)
        return 0
    from tests.fuzz import targets as fuzz_targets

    options.targets = options.targets or [*fuzz_targets.TARGETS]
    options.found.mkdir(exist_ok=True)
    seconds = round(options.minutes * 60 / len(options.targets))
    results = {name: fuzz(name, seconds, options.found.resolve()) for name in options.targets}
    total = sum(each["inputs"] for each in results.values())
    clean = all(each["clean"] for each in results.values())
    print(json.dumps({"inputs": total, "minutes": options.minutes, "clean": clean, **results}))
    if clean:
        options.found.rmdir()
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
