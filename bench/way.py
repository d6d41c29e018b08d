"""python -m bench.way JOB.json: ways of training in a process of their own; each writes what it measured as JSON.

A job holds: way, started (the parent's time.monotonic()), out, work, cap_gib, sms, t4_attention, steps (of the
schedule), stop_after, and for fast_ft recipe and overrides, for the others rows, base, tokenizer, adapter (initial, or
null), lora, train, seed, dtype, max_length. It may hold: turn, a file to wait for before the card is used; settle, the
settings by which a way's steps are enough before `stop_after`; seconds, after which a way stops; and ways, a list of
what differs (way, out, work) where several ways share the process and its imports. They start when the one before
has ended; until_seconds: no way starts later than this after the process's turn.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.watch import Watch


def main() -> int:
    """Do the job, write its results, and return the exit status; running out of memory is a result."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from bench import emulation

    limits = emulation.Limits(job["cap_gib"], job["sms"], job["t4_attention"], job.get("turn"))
    if "ways" not in job:
        _write(job, measured(job, limits))
        return 0
    for place, each in enumerate(job["ways"]):
        if place and time.monotonic() - limits.turn_began > job["until_seconds"]:
            break
        one = job | each | ({"started": time.monotonic()} if place else {})
        try:
            _write(one, measured(one, limits))
        except Exception as error:  # the ways after it are measured all the same
            traceback.print_exc()
            _write(one, {"way": each["way"], "failed": f"{type(error).__name__}: {error}"[:500]})
        _let_go()
    return 0


def measured(job: dict[str, Any], limits: Any) -> dict[str, Any]:
    """Train one way; return its samples."""
    os.environ.pop("UNSLOTH_TOKEN_BUDGET", None)  # of a way before
    watch = Watch(job["started"])
    watch.stamp("python")
    from bench import compare, ours, peers
    from fast_ft.run import provenance

    if settings := job.get("settle"):
        packed = job["way"] in peers.PEERS and peers.PEERS[job["way"]].packed
        watch.settled = lambda steps: compare.stands_by_epochs(settings, {"steps": steps, "packed": packed})
    elif seconds := job.get("seconds"):
        watch.settled = lambda steps: len(steps) >= compare.FEWEST and sum(each["seconds"] for each in steps) > seconds
    run = ours.run if job["way"] in ours.WAYS else peers.run
    try:
        found: dict[str, Any] = run(job, limits, watch)
    except Exception as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        found = {"out_of_memory": True}
    watch.finish()
    return {
        "way": job["way"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "stamps": watch.stamps,
        **limits.to_json(),
        **found,
        "schedule_steps": job["steps"],
        "steps": watch.steps,
        "gradient": watch.gradient,
        "program": provenance.describe()["program"],
    }


def _write(job: dict[str, Any], result: dict[str, Any]) -> None:
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def _let_go() -> None:
    """Give the way's memory back; what its error or its trainer held goes first."""
    import torch

    for _ in range(2):
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
