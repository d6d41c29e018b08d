"""python -m bench.best_peer survey|finals|merge [RECIPE] [key=value ...] --results FILE: peers at their best.

    survey   every way of bench/peer_table.py once, 18 steps over the recipe's first 24 rows: few lengths, so that what
             is compiled for each length is soon compiled
    finals   fast_ft, through its own blocks and through Unsloth's layers, and the survey's two fastest, or --ways: each
             way twice, interleaved, in a process of its own, until the median of its last 12 steps stands, or all steps
             are done

    merge    measures nothing: --results FILE takes in OTHER.json, given in RECIPE's place, of the same rows

With --emulate t4 both run on 8 of the card's SMs: a T4-class emulation, not a T4. All processes import before the first
one measures, because importing beside it would slow down a way that waits for the CPU; peers load their models side by
side, too. Waiting counts nowhere. A result holds both parts and both set-ups; `python -m bench --adopt
FILE` takes its figures, and refuses them without a best peer.
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
from collections.abc import Iterator
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
SURVEY_ROWS, SURVEY_STEPS, SURVEY_SECONDS = 24, 18, 6.0  #: of each way; a way that takes more seconds stops earlier
LOADED = 8  #: models that are on the card at once
GATES = ("load", "turn")  #: where a process waits: for loading its model beside others, and for the card to itself


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
    parser.add_argument(
        "--ways", help="these, separated by commas; default: all in a survey, ours and its two fastest in finals"
    )
    parser.add_argument("--steps", type=int, help="finals: at most this number of steps; default: the schedule's")
    parser.add_argument("--runs", type=int, default=peer_figures.RUNS, help="finals: of each way; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1e9, metavar="S", help="no way starts once the card was used so long"
    )
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
        self.settings, _ = training.describe(loader.load_recipe(options.recipe, options.overrides))
        self.result = training.merged(options.results, self.settings, options.command, kind="peers")
        self.parts = self.result["setups"].setdefault(self.where.name, {"survey": {}, "finals": []})

    def measure(self) -> dict[str, Any]:
        """Do the part that was asked for; return the whole result."""
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            (self._survey if self.options.part == "survey" else self._finals)(Path(name))
        return self.result

    def _job(self, work: Path, overrides: list[str]) -> dict[str, Any]:
        """Return what the jobs of all ways have in common, and under "settings" what is measured."""
        recipe = loader.load_recipe(self.options.recipe, overrides)
        settings, rows = training.describe(recipe)
        order = training.Order(
            self.options.results, self.options.recipe, overrides, self.where, self.options.timeout,
            again=True, command=self.options.command,
        )  # fmt: skip
        adapter = str(training.initial_adapter(work, recipe))
        return training.job_of(order, recipe, settings) | {"rows": rows, "adapter": adapter, "settings": settings}

    def _survey(self, work: Path) -> None:
        peers = [way for way, peer in PEERS.items() if not (self.options.emulate and peer.not_emulated)]
        wanted = self._wanted() or ["fast_ft", *peers, "fast_ft-unsloth"]
        rows = min(SURVEY_ROWS, self.settings["rows"])
        epochs = -(-SURVEY_STEPS // -(-rows // self.settings["effective_batch_size"]))
        more = [f"select.take={rows}", f"train.num_train_epochs={epochs}"]
        job = self._job(work, [*self.options.overrides, *more]) | {
            "stop_after": SURVEY_STEPS, "seconds": SURVEY_SECONDS,
        }  # fmt: skip
        own = {key: job["settings"][key] for key in ("tokens_per_step", "rows", "rows_digest")}
        turns = [Turn(work, way, way, job, self._log(way)) for way in wanted]
        for part in self._in_turn(turns):
            self._keep_survey(part | {"settings": own})

    def _wanted(self) -> list[str]:
        """Return what --ways names, if it does; InputError for what is not known."""
        known = (*ours.WAYS, *PEERS)
        wanted = self.options.ways.split(",") if self.options.ways else []
        if unknown := [way for way in wanted if way not in known]:
            raise InputError(f"--ways: {unknown[0]!r} is none of {', '.join(known)}.")
        return wanted

    def _in_turn(self, turns: list[Turn]) -> Iterator[dict[str, Any]]:
        """Yield what each way measured. All import at first; of LOADED models on the card at a time, one computes."""
        with contextlib.ExitStack() as running:
            for turn in turns:
                running.enter_context(turn)
            for turn in turns:
                turn.wait_at(*GATES)
            began = time.monotonic()
            for place, turn in enumerate(turns):
                if place % LOADED == 0:
                    for each in turns[place : place + LOADED]:
                        each.open("load")
                    for each in turns[place : place + LOADED]:
                        each.wait_at("turn")
                if time.monotonic() - began > self.options.seconds:
                    say(f"{self.options.seconds:.0f} s are over before {', '.join(each.way for each in turns[place:])}")
                    return
                yield turn.run(self.options.timeout)

    def _keep_survey(self, part: dict[str, Any]) -> None:
        survey = self.parts["survey"]
        survey[part["way"]] = compared(part, part if part["way"] == "fast_ft" else survey.get("fast_ft", part))
        self._write()
        say(f"{self.where.name} {peer_figures.survey_line(self.settings, part)}")

    def _finals(self, work: Path) -> None:
        best = peer_figures.best_two(self.settings, self.parts["survey"])
        if not best:
            raise InputError(f"{self.options.results}: no survey of {self.where.name}; measure that first.")
        steps = min(self.options.steps or self.settings["schedule_steps"], self.settings["schedule_steps"])
        job = self._job(work, self.options.overrides) | {"stop_after": steps, "settle": self.settings}
        turns = [
            Turn(work, f"{way}-{run}", way, job, self._log(f"{way}-{run}"))
            for run in range(self.options.runs)
            for way in self._wanted() or (*ours.WAYS, *best)
        ]
        for part in self._in_turn(turns):
            mine = [each for each in (*self.parts["finals"], part) if each["way"] == "fast_ft"]
            self.parts["finals"].append(compared(part, mine[0]) if mine else part)
            self._write()
            say(f"{self.where.name} {peer_figures.survey_line(self.settings, part)}")

    def _log(self, name: str) -> Path:
        path: Path = self.options.results
        return path.parent / "logs" / f"{path.stem}-{self.where.name}-{self.options.part}-{name}.log"

    def _write(self) -> None:
        self.result["date"] = now()
        write_json(self.options.results, self.result)


def compared(part: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Return a part with what stands against comparing it with ours, and without what only that asks for."""
    if "failed" not in part and "failed" not in mine:
        part |= {"refused": compare.disagreements(mine, part), "cosine": compare.cosine(mine, part)}
    if part["way"] != "fast_ft":
        part.get("gradient", {}).pop("sketch", None)  # 20 KB
    return part


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


class Turn:
    """One way's process, which imports at once, and loads and measures when it is let: bench.emulation.Limits waits."""

    def __init__(self, work: Path, name: str, way: str, job: dict[str, Any], log: Path) -> None:
        self.way, self.log = way, log
        self._folder, self._file, self._out = (work / f"{name}{end}" for end in ("", ".job.json", ".json"))
        self._folder.mkdir()
        self._job = job | {"way": way, "out": str(self._out), "work": str(self._folder), "turn": str(self._folder)}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Turn:
        """Start the process; it imports, and waits."""
        self._file.write_text(json.dumps(self._job | {"started": time.monotonic()}), encoding="utf-8")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = process.start([sys.executable, "-m", "bench.way", str(self._file)], self.log)
        return self

    def __exit__(self, *_: object) -> None:
        """End the process where it still runs."""
        if self._process is not None:
            process.end(self._process)

    def wait_at(self, *gates: str) -> None:
        """Wait until the process stands at one of these gates, or has ended."""
        assert self._process is not None
        while self._process.poll() is None and not any(Path(f"{self._folder}.at-{gate}").exists() for gate in gates):
            time.sleep(0.02)

    def open(self, gate: str) -> None:
        """Let the process through a gate."""
        Path(f"{self._folder}.{gate}").touch()

    def run(self, timeout: float) -> dict[str, Any]:
        """Let it use the card until it ends; return what it wrote, with the commit, or how it failed."""
        assert self._process is not None
        for gate in GATES:
            self.open(gate)
        status = process.wait(self._process, timeout)
        if status == 0:
            part: dict[str, Any] = json.loads(self._out.read_text(encoding="utf-8"))
            part["gradient"].pop("norms", None)
        else:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            say(f"{self.way} failed ({status}); {self.log} ends with:\n  " + "\n  ".join(lines))
            part = {"way": self.way, "failed": f"{status}: {lines[-1][:300] if lines else ''}"}
        return part | {"commit": machine.commit()}


if __name__ == "__main__":
    sys.exit(main())
