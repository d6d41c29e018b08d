"""python -m bench.way JOB.json: one way of training, in a process of its own; writes what it measured as JSON.

A job holds: way, started (the parent's time.monotonic()), out, work, cap_gib, sms, t4_attention, steps (of the
schedule), stop_after, and for fast_ft recipe and overrides, for the others rows, base, tokenizer, adapter (initial, or
null), lora, train, seed, dtype, max_length. It may hold turn, a file to wait for before the card is used; settle, the
settings by which a way's steps may be enough before `stop_after`; and seconds, after which a slow way stops.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.watch import Watch
from fast_ft.common.atomic_files import write_json


def main() -> int:
    """Do the job, write its result, and return the exit status; running out of memory is a result."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    watch = Watch(job["started"])
    watch.stamp("python")
    from bench import compare, emulation, ours, peers
    from fast_ft.run import provenance

    limits = emulation.Limits(job["cap_gib"], job["sms"], job["t4_attention"], job.get("turn"))
    if settings := job.get("settle"):
        if job["way"] in peers.PEERS and peers.PEERS[job["way"]].packed:
            settings |= {"tokens_per_step": [1] * len(settings["tokens_per_step"])}  # its sequences are of one length
        watch.settled = lambda steps: compare.stands_by_epochs(settings, {"steps": steps})
    elif seconds := job.get("seconds"):
        watch.settled = lambda steps: compare.long_enough(steps, seconds)
    run = ours.run if job["way"] in ours.WAYS else peers.run
    try:
        found: dict[str, Any] = run(job, limits, watch)
    except Exception as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        found = {"out_of_memory": True}
    limits.end_turn()
    watch.finish()
    result = {
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
    write_json(Path(job["out"]), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
