"""python -m bench.card_parts JOB.json: one part of what a card's owner measures, in a process of its own.

A job holds: part, started (the parent's time.monotonic()), out, work (a folder that all parts share), base (a model's
folder, or null: random weights in Llama-2-7B's shape, made on the card), scale (the fields of Scale). What is measured
is in `out` at once, so that a part that is stopped leaves what it has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import card_rates
from bench.card_scale import Scale
from fast_ft.common.atomic_files import write_json
from fast_ft.common.redaction import redacted

Keep = Callable[[str, Any], None]


def main() -> int:
    """Do the job's part, and return the exit status. An error is a result: its one-line reason."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        """Keep a value, in the file too."""
        found[name] = value
        write_json(Path(job["out"]), found)

    try:
        PARTS[job["part"]](job, Scale(**job["scale"]), keep)
    except Exception as error:  # whatever fails on a stranger's machine is what its owner reports
        keep("failed", reason(error))
    return 0


def reason(error: BaseException) -> str:
    """Return an error's kind and first line."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return redacted(f"{type(error).__name__}: {first[:300]}")


def _rates(job: dict[str, Any], scale: Scale, keep: Keep) -> None:
    card_rates.measure(scale, keep)


def _whole(job: dict[str, Any], scale: Scale, keep: Keep) -> None:
    from bench import card_whole

    card_whole.measure(scale, keep, job["base"])


def _layers(job: dict[str, Any], scale: Scale, keep: Keep) -> None:
    from bench import card_layers

    backend = "fused" if job["part"] == "ours" else "unsloth"
    card_layers.measure(scale, keep, Path(job["work"]), backend, job["started"])


PARTS = {"rates": _rates, "whole": _whole, "ours": _layers, "unsloth": _layers}

if __name__ == "__main__":
    sys.exit(main())
