"""python -m bench.real --base FILE --train FILE --held-out FILE: what ways of choosing rows are worth, on a card.

Each call does runs for some minutes in several processes side by side and keeps their samples as they come, a line of
JSON each; the next call goes on. Samples hold numbers and row ids, no text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import choices_figures, choices_run, figures, machine
from fast_ft.common.atomic_files import write_text

_GRACE_SECONDS = 25  #: that a run may go on after the deadline, before its process is ended


@dataclass(frozen=True)
class Call:
    """One call: the base (a folder or a .gguf file), two files of rows, and how long how many processes may run.

    samples: a folder of JSON lines, read and added to. target: the result; None: bench/results/choices-CARD.json.
    """

    base: str
    train: Path
    held_out: Path
    samples: Path
    processes: int = 4
    minutes: float = 3.0
    capture: bool = False
    only: tuple[str, ...] = ()
    target: Path | None = None


def measure(call: Call) -> dict[str, Any]:
    """Do runs until the minutes are over or all are done; return the result of all samples, which is written too.

    RuntimeError with a process's own words where it failed and no run came out.
    """
    from fast_ft.hub import download

    started = time.time()
    base = str(download.model_folder(call.base).absolute())
    call.samples.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as claims:
        running = []
        for number in range(call.processes):
            order = choices_run.Order(
                base, str(call.train), str(call.held_out), str(call.samples / f"{int(started)}-{number}.jsonl"),
                claims, started + 60 * call.minutes, "tokenizer", call.capture, call.only,
            )  # fmt: skip
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "bench.choices_run", json.dumps(asdict(order))],
                    cwd=machine.ROOT, stdout=subprocess.DEVNULL, stderr=(call.samples / f"{number}.log").open("w"),
                )
            )  # fmt: skip
        for process in running:
            try:
                process.wait(max(1.0, started + 60 * call.minutes + _GRACE_SECONDS - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    runs = choices_run.samples(call.samples)
    if not runs:
        raise RuntimeError((call.samples / "0.log").read_text(encoding="utf-8")[-3000:])
    command = "python -m bench.real --base models/smollm2-135m-instruct.gguf --train ROWS --held-out OTHER_ROWS"
    result = {"kind": "choices", **machine.stamp(command), "processes": call.processes, "runs": runs}
    result["commit"] = "; ".join(dict.fromkeys(str(run["commit"]) for run in runs))  # calls may be of several
    write_text(call.target or figures.RESULTS / f"choices-{machine.slug_of(result)}.json", text_of(result))
    seconds = time.time() - started
    new = [run for run in runs if run["at"] >= started]
    print(f"{len(new)} runs in {seconds:.0f} s, {60 * len(new) / seconds:.1f} a minute; {len(runs)} in all")
    print(json.dumps({name: value for name, (value, _) in choices_figures.headline(result).items()}))
    return result


def text_of(result: dict[str, Any]) -> str:
    """Return a result as JSON with one run a line, which is a tenth of the lines that one value a line would take."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2, ensure_ascii=False)
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in result["runs"])
    return f'{head.removesuffix("}").rstrip()},\n  "runs": [\n{runs}\n  ]\n}}\n'
