"""What owners of cards sent (`python -m bench --quick --submit-file`), as rows of the README's results.

A file comes from somebody whom nobody knows: it is read as bounded data, each number as a number, each text as one
plain line.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench import compare, figures
from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import plain

LOSS = 0.002  #: by which the first losses of two ways may differ, of the loss
_WARM_UP = 6  #: steps
_COLUMNS = (
    "received from an owner, not by us", "TFLOP/s, first and last", "GB/s", "launches/s",
    "training, tokens/s: our layers, Unsloth's", "simple.yaml's first epoch",
    "decoding step: our kernels, bitsandbytes",
    "doctor",
)  # fmt: skip
NONE = "Nobody has sent a file from a T4 yet. [You have a T4? Ten minutes](docs/t4.md)."

Facts = dict[str, Any]


def received(folder: Path | None = None) -> list[Facts]:
    """Return the facts of each file of a card's owner in bench/results/received/, in the order of their names."""
    found = []
    for path in sorted((folder or figures.RESULTS / "received").glob("*.json")):
        content = untrusted_files.json_object(path)
        if content.get("kind") == "card":
            found.append(facts(content, path.name))
    return found


def facts(content: dict[str, Any], name: str) -> Facts:
    """Return what the table shows of a file's raw samples; None for what the file does not hold.

    Raises:
        InputError: the file is not what `--quick --submit-file` writes.
    """
    try:
        parts = {key: part for key, part in content["parts"].items() if isinstance(part, dict)}
        rates, whole = parts.get("rates", {}), parts.get("whole", {})
        tflops = [_number(each) for each in rates.get("tflops", [])]
        doctor = parts.get("doctor", {}).get("works")
        return {
            "card": _word(content["environment"]["gpu"]["name"]),
            "date": _word(content["date"]),
            "partial": bool(content["partial"]),
            "tflops": [tflops[0], tflops[-1]] if tflops else None,
            "gb_per_s": _number(rates.get("gb_per_s")),
            "launches_per_s": _number(rates.get("launches_per_s")),
            "training": _training(parts.get("ours", {}), parts.get("unsloth", {})),
            "simple_minutes": _simple(whole.get("simple") or {}),
            "decode": {way: _slowest(part) for way, part in (whole.get("decode") or {}).items()},
            "works": doctor if isinstance(doctor, bool) else None,
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{name}: not a file of `python -m bench --quick --submit-file` ({error!r})") from error


def markdown(sent: list[Facts]) -> str:
    """Return the rows in Markdown; a sentence where nobody sent any."""
    if not sent:
        return NONE
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*lines, *(_row(each) for each in sent), "", "[How an owner measures a card](docs/t4.md)."])


def _row(of: Facts) -> str:
    training, decode = of["training"], of["decode"]
    speeds = ", ".join(_shown(training[way], "{:,.0f}") for way in ("ours", "unsloth"))
    agrees = {True: " (they agree)", False: " (they differ: not compared)", None: " (not compared)"}[training["agrees"]]
    steps = ", ".join(_shown(decode.get(way), "{0[ms]:.0f} ms") for way in ("ours", "bitsandbytes"))
    slots = next((f" ({step['slots']:.0f} answers at once)" for step in decode.values() if step), "")
    cells = [
        f"{of['card']}, {of['date']}" + (", not whole" if of["partial"] else ""),
        _shown(of["tflops"], "{0[0]:.1f}, {0[1]:.1f}"),
        _shown(of["gb_per_s"], "{:.0f}"),
        _shown(of["launches_per_s"], "{:,.0f}"),
        speeds + agrees,
        _shown(of["simple_minutes"], "{:.1f} min"),
        steps + slots,
        {True: "a run works", False: "a run would fail", None: "-"}[of["works"]],
    ]
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _training(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return tokens/s of both ways, and whether they did the same work: first loss and gradient. None: not known."""
    found: dict[str, Any] = {"ours": _speed(ours), "unsloth": _speed(theirs), "agrees": None}
    if found["ours"] is not None and found["unsloth"] is not None:
        first, other = (_number(part["steps"][0]["loss"]) for part in (ours, theirs))
        cosine = compare.cosine(ours, theirs)
        if first is not None and other is not None and cosine is not None:
            found["agrees"] = abs(first - other) <= LOSS * abs(first) and cosine >= compare.COSINE
    return found


def _speed(part: dict[str, Any]) -> float | None:
    """Return the median tokens/s behind the warm-up; None where a way was stopped before."""
    seconds = [_number(step["seconds"]) for step in part.get("steps", [])][_WARM_UP:]
    known = [each for each in seconds if each]
    tokens = _number(part.get("tokens_per_step"))
    return tokens / statistics.median(known) if known and tokens else None


def _simple(part: dict[str, Any]) -> float | None:
    """Return the minutes of simple.yaml's first epoch; None where it was not trained to its end."""
    seconds = _number(part.get("seconds"))
    return seconds / 60 if seconds is not None and part["steps"] == part["planned_steps"] else None


def _slowest(part: dict[str, Any]) -> dict[str, float] | None:
    """Return slots and milliseconds of the step with most slots; None without one."""
    steps = [{"slots": _number(step["slots"]), "ms": _number(step.get("ms_a_step"))} for step in part.get("steps", [])]
    known = [{key: value for key, value in step.items() if value is not None} for step in steps]
    return max((step for step in known if len(step) == 2), key=lambda step: step["slots"], default=None)


def _number(value: Any) -> float | None:
    """Return a finite number as it is, None for None; ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{plain(str(value))[:40]!r} is no number")
    return float(value)


def _word(value: Any) -> str:
    """Return a short text that is nothing else in Markdown; ValueError for anything else."""
    if not isinstance(value, str) or not 0 < len(value) <= 60 or any(each in value for each in "|<>`[]*\n"):
        raise ValueError(f"{plain(str(value))[:40]!r} is no name")
    return plain(value)
