"""python -m bench.best_peer survey|finals|merge [RECIPE] [key=value ...] --results FILE: peers at their best.

    survey   every way of bench/peer_table.py once, 18 steps each; ways that share an import share a process
    finals   the survey's two fastest and fast_ft, through its own blocks and through Unsloth's layers: each way twice,
             interleaved, in a process of its own, until the median of its last 12 steps stands, or all steps are done

    merge    measures nothing: --results FILE takes in OTHER.json, given in RECIPE's place, of the same rows

With --emulate t4 both run on 8 of the card's SMs: a T4-class emulation, not a T4. Processes import while others measure
and wait for their turn before they use the card; the waiting counts nowhere. A result holds both parts and both
set-ups; `python -m bench --adopt FILE` takes its figures, and refuses them without a best peer.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import compare, emulation, machine, ours, peer_figures, process, training
from bench.clock import say
from bench.peer_table import PEERS
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.recipe import loader
from fast_ft.run.folder import now

RECIPE = str(Path(__file__).parent / "recipes" / "first-100.yaml")
SURVEY_STEPS, SURVEY_SECONDS = 18, 10.0  #: steps of each way; a way that is slower than these seconds stops earlier
RUNS = 2


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result after each way, and print what it says; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.best_peer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["survey", "finals", "merge"])
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, required=True, help="a JSON, new or with the parts before")
    parser.add_argument("--emulate", choices=["t4"], help=f"{emulation.LABEL}; ratios only")
    parser.add_argument("--cap", type=float, default=emulation.T4_GIB, help="GiB, context included; 0: no cap")
    parser.add_argument("--ways", help="survey these, separated by commas; default: all")
    parser.add_argument("--steps", type=int, help="finals: at most this number of steps; default: the schedule's")
    parser.add_argument("--seconds", type=float, default=1e9, help="survey: a process starts no way later than this")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    options = parser.parse_intermixed_args(given)
    if "=" in options.recipe:
        options.recipe, options.overrides = RECIPE, [options.recipe, *options.overrides]
    options.command = shlex.join(["python", "-m", "bench.best_peer", *given])
    try:
        merging = options.part == "merge"
        result = merge(options.results, Path(options.recipe)) if merging else Comparison(options).measure()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(peer_figures.markdown(result))
    return 0


class Comparison:
    """One call's measurements: what was asked for, and the result that they go into."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.where = training.setup(options.emulate, 8, options.cap)
        recipe = loader.load_recipe(options.recipe, options.overrides)
        self.settings, self.rows = training.describe(recipe)
        self.recipe = recipe
        self.result = training.merged(options.results, self.settings, options.command, kind="peers")
        self.parts = self.result["setups"].setdefault(self.where.name, {"survey": {}, "finals": []})

    def measure(self) -> dict[str, Any]:
        """Do the part that was asked for; return the whole result."""
        order = training.Order(
            self.options.results, self.options.recipe, self.options.overrides, self.where, self.options.timeout,
            again=True, command=self.options.command,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            work = Path(name)
            shared = training.job_of(order, self.recipe, self.settings) | {
                "rows": self.rows, "adapter": str(training.initial_adapter(work, self.recipe)),
            }  # fmt: skip
            (self._survey if self.options.part == "survey" else self._finals)(work, shared)
        return self.result

    def _survey(self, work: Path, shared: dict[str, Any]) -> None:
        peers = [way for way, peer in PEERS.items() if not (self.options.emulate and peer.not_emulated)]
        wanted = self.options.ways.split(",") if self.options.ways else ["fast_ft", *peers, "fast_ft-unsloth"]
        if unknown := [way for way in wanted if way not in (*ours.WAYS, *PEERS)]:
            raise InputError(f"--ways: {unknown[0]!r} is none of {', '.join((*ours.WAYS, *PEERS))}.")
        groups: dict[str, list[str]] = {}
        for way in wanted:
            groups.setdefault("fast_ft" if way == "fast_ft" else library_of(way), []).append(way)
        limit = {"stop_after": min(SURVEY_STEPS, self.settings["schedule_steps"]), "seconds": SURVEY_SECONDS}
        turns = [
            Turn(work, name, ways, shared | limit | {"until_seconds": self.options.seconds}, self._log(name))
            for name, ways in groups.items()
        ]
        with contextlib.ExitStack() as running:
            for turn in turns:
                running.enter_context(turn)
            for turn in turns:
                for part in turn.run(self.options.timeout):
                    self._keep_survey(part)

    def _keep_survey(self, part: dict[str, Any]) -> None:
        survey = self.parts["survey"]
        mine = survey.get("fast_ft") or part
        if "failed" not in part and "failed" not in mine:
            part["refused"] = compare.disagreements(mine, part)
        survey[part["way"]] = part
        self._write()
        say(f"{self.where.name} {peer_figures.survey_line(self.settings, part)}")

    def _finals(self, work: Path, shared: dict[str, Any]) -> None:
        best = peer_figures.best_two(self.settings, self.parts["survey"])
        if not best:
            raise InputError(f"{self.options.results}: no survey of {self.where.name}; measure that first.")
        steps = min(self.options.steps or self.settings["schedule_steps"], self.settings["schedule_steps"])
        job = shared | {"stop_after": steps, "settle": self.settings}
        turns = [
            Turn(work, f"{way}-{run}", [way], job, self._log(f"{way}-{run}"))
            for run in range(RUNS)
            for way in (*ours.WAYS, *best)
        ]
        with contextlib.ExitStack() as running:
            running.enter_context(turns[0])
            for turn, after in zip(turns, [*turns[1:], None], strict=True):
                if after is not None:
                    running.enter_context(after)  # it imports, and waits
                for part in turn.run(self.options.timeout):
                    self.parts["finals"].append(part)
                    self._write()
                    say(f"{self.where.name} {peer_figures.survey_line(self.settings, part)}")

    def _log(self, name: str) -> Path:
        path: Path = self.options.results
        return path.parent / "logs" / f"{path.stem}-{self.where.name}-{self.options.part}-{name}.log"

    def _write(self) -> None:
        self.result["date"] = now()
        write_json(self.options.results, self.result)


def merge(path: Path, other: Path) -> dict[str, Any]:
    """Take another result's parts into that at `path`, which may be new; return it. InputError for other settings."""
    found: dict[str, Any] = json.loads(other.read_text(encoding="utf-8"))
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in result["settings"] if result["settings"][key] != found["settings"].get(key))
        if different:
            raise InputError(f"{other}: measured with other settings ({', '.join(different)}) than {path}.")
        for name, parts in found["setups"].items():
            into = result["setups"].setdefault(name, {"survey": {}, "finals": []})
            into["survey"] = parts["survey"] | into["survey"]
            into["finals"] += [part for part in parts["finals"] if part not in into["finals"]]
        for key in ("command", "commit"):
            result[key] = "; ".join(dict.fromkeys(f"{result[key]}; {found[key]}".split("; ")))
        result["date"] = max(result["date"], found["date"])
        found = result
    write_json(path, found)
    return found


def library_of(way: str) -> str:
    """Return which processes a way may share: importing Unsloth patches transformers and TRL."""
    return "unsloth" if way == "fast_ft-unsloth" or (way in PEERS and PEERS[way].unsloth) else "trl"


class Turn:
    """A process that imports at once, and uses the card when its turn comes."""

    def __init__(self, work: Path, name: str, ways: Sequence[str], job: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        self._go, self._file = work / f"{name}.turn", work / f"{name}.job.json"
        each = [
            {"way": way, "out": str(work / f"{name}-{way}.json"), "work": str(work / f"{name}-{way}")} for way in ways
        ]
        for one in each:
            Path(one["work"]).mkdir()
        self._outs = [Path(one["out"]) for one in each]
        self._job = {"until_seconds": 1e9} | job | {"turn": str(self._go), "ways": each}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Turn:
        """Start the process; it imports, and waits for its turn."""
        self._file.write_text(json.dumps(self._job | {"started": time.monotonic()}), encoding="utf-8")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = process.start([sys.executable, "-m", "bench.way", str(self._file)], self.log)
        return self

    def __exit__(self, *_: object) -> None:
        """End the process where it still runs."""
        if self._process is not None:
            process.end(self._process)

    def run(self, timeout: float) -> list[dict[str, Any]]:
        """Let it use the card until it ends; return what its ways wrote, each with the commit that measured it."""
        assert self._process is not None
        self._go.touch()
        status = process.wait(self._process, timeout)
        found = [json.loads(out.read_text(encoding="utf-8")) for out in self._outs if out.is_file()]
        if status != 0:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            say(f"{self.name} failed ({status}); {self.log} ends with:\n  " + "\n  ".join(lines))
        for part in found:
            part.get("gradient", {}).pop("norms", None)
            part["commit"] = machine.commit()
        return found


if __name__ == "__main__":
    sys.exit(main())
