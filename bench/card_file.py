"""`python -m bench --quick --submit-file`: what the owner of a card can measure in ten minutes, in one file to send.

Each part runs in a process of its own, within a box of time. What a part does not use, later parts may. A part that
fails, or that takes too long, is recorded with its reason and what it had measured, and the rest goes on. The file is
written again after each part, so that Ctrl-C, or a runtime that is lost, leaves what was measured.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import machine, submit_file
from bench.card_scale import Scale
from bench.clock import say
from bench.process import run_process
from fast_ft.common import gpu
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.hub.families import GIB

SECONDS = 590  #: for all parts; the rest of ten minutes is for starting and writing
DISK_GIB = 2.5  #: the 4-bit folder of 8 layers, and trainers' work folders
STOPPED = "stopped by Ctrl-C"


@dataclass(frozen=True)
class Part:
    """One part: its name in the file, the seconds that are kept for it, and what it measures, for its owner to read."""

    name: str
    seconds: float
    what: str


PARTS = (
    Part("rates", 110, "large products until their rate stops falling (60 to 80 s), memory bandwidth, kernel launches, "
         "4-bit products by our kernels and by bitsandbytes"),
    Part("whole", 150, "a 7B of random weights, made on the card: simple.yaml's first epoch, 13 steps, and a "
         "decoding step, by our kernels and by bitsandbytes alone"),
    Part("doctor", 140, "`python -m fast_ft doctor`: driver, packages, and the check of every kernel"),
    Part("ours", 75, "18 training steps through our own layers, 8 of a 7B's 32"),
    Part("unsloth", 115, "the same steps through Unsloth's layers, from the same weights, and whether they agree"),
)  # fmt: skip
HOLDS = (
    "rates and seconds, losses, a sketch of one gradient (2,048 numbers), the doctor's findings, the card's name, "
    "memory, driver, clock, temperature and power, versions of packages, the date"
)
HOLDS_NOT = "your name, the machine's name, paths, addresses, keys, or any row or text of yours"


@dataclass
class Order:
    """What a command asks for. `base`: a folder of the owner's with a 7B; None: random weights."""

    path: Path
    base: str | None = None
    scale: Scale = field(default_factory=Scale)
    parts: tuple[Part, ...] = PARTS
    seconds: float = SECONDS


def order(options: Any) -> Order:
    """Return the order of the command line's options, checked before anything is measured.

    Raises:
        InputError: there is no card that torch sees, an override has no effect here, disk is short, or the file could
            not be written.
    """
    base, others = None, [each for each in options.overrides if not each.startswith("model.name_or_path=")]
    if options.recipe or others:
        named = options.recipe or others[0]
        raise InputError(f"{named}: --quick --submit-file measures the same on every card; it takes no recipe, and of "
                         "settings only model.name_or_path=FOLDER")  # fmt: skip
    card = gpu.gpu()
    if card is None or not _torch_sees_it():
        raise InputError("--quick --submit-file measures an NVIDIA GPU, and torch sees none. `python -m fast_ft "
                         "doctor` says why; on Colab: Runtime > Change runtime type > T4 GPU")  # fmt: skip
    for each in options.overrides:
        base = each.partition("=")[2]
        if not Path(base).is_dir():
            raise InputError(f"{each}: no such folder. Name a model's folder here: this command downloads nothing")
        base = str(download.model_folder(base).resolve())
    free = shutil.disk_usage(tempfile.gettempdir()).free / GIB
    if free < DISK_GIB:
        raise InputError(f"{tempfile.gettempdir()}: {free:.1f} GiB are free, and {DISK_GIB:g} GiB are needed for a "
                         "while. Free some, or point TMPDIR at another disk")  # fmt: skip
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.results).close()
    except OSError as error:
        raise InputError(f"--results {options.results}: nothing can be written there ({error.strerror}). Name another "
                         "folder") from None  # fmt: skip
    name = options.submit_file or machine.card_slug(card["name"])
    return Order(options.results / f"submit-{name}.json", base)


def announcement(order: Order, card: str) -> str:
    """Return what will be done, in what time, with what disk and download, and what the file will hold."""
    lines = [
        f"This measures {card} in at most {round((order.seconds + 10) / 60)} minutes. End what else uses the card.",
        *(f"  {place}. {part.name} (about {part.seconds:.0f} s): {part.what}" for place, part in _numbered(order)),
        "Download: nothing. " + (f"The 7B is read from {order.base}." if order.base else "No model is needed."),
        f"Disk: {DISK_GIB:g} GiB for a while, in {tempfile.gettempdir()}. GPU memory: up to 13 GiB.",
        f"The file will hold {HOLDS}.",
        f"It will not hold {HOLDS_NOT}. Nothing is sent by itself: you send the file, or you do not.",
        "Ctrl-C ends it early: what was measured by then is in the file, which says that it is not whole.",
        f"File: {order.path}",
    ]
    return "\n".join(lines)


def measure(order: Order) -> dict[str, Any]:
    """Measure all parts, and write the file behind each; return its content. Ctrl-C ends the rest."""
    started = time.monotonic()
    content = _new(order)
    parts: dict[str, dict[str, Any]] = content["parts"]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        for place, part in _numbered(order):
            later = sum(each.seconds for each in order.parts[place:])
            limit = order.seconds - (time.monotonic() - started) - later
            say(f"{place} of {len(order.parts)}: {part.name}, {limit:.0f} s at most ...")
            began = time.monotonic()
            try:
                parts[part.name] = _run(part, order, work, max(1.0, limit))
            except KeyboardInterrupt:
                parts[part.name] = _kept(work / f"{part.name}.json") | {"failed": STOPPED}
                content["stopped"] = True
            parts[part.name]["took"] = round(time.monotonic() - began, 1)
            if why := parts[part.name].get("failed"):
                say(f"  {part.name}: {why}")
            content["partial"] = len(parts) < len(order.parts) or any("failed" in each for each in parts.values())
            content["took"] = round(time.monotonic() - started, 1)
            write_json(order.path, submit_file.without_names(content))
            if content["stopped"]:
                break
    return submit_file.without_names(content)


def how_to_send(order: Order, content: dict[str, Any]) -> str:
    """Return what the owner does now: where the file lies, and where it goes."""
    project = tomllib.loads((machine.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    failed = [name for name, part in content["parts"].items() if "failed" in part]
    missing = [part.name for part in order.parts if part.name not in content["parts"]]
    lacks = ", ".join([*failed, *missing])
    said = f" It is not whole ({lacks}), and of use all the same." if lacks else ""
    return (
        f"{order.path}\nThat is the file.{said} Read it, then attach it to a new issue: "
        f"{project['urls']['Repository']}/issues/new (docs/t4.md)"
    )


def _torch_sees_it() -> bool:
    """Return whether torch is installed and sees the card."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _numbered(order: Order) -> list[tuple[int, Part]]:
    return list(enumerate(order.parts, 1))


def _new(order: Order) -> dict[str, Any]:
    stamp = machine.stamp("python -m bench --quick --submit-file")
    return {
        "kind": "card", "sent": True, "partial": True, "stopped": False, "date": stamp["date"][:10],
        "commit": stamp["commit"], "cores": stamp["cores"], "took": 0.0,
        "environment": submit_file.environment(stamp["environment"]),
        "settings": asdict(order.scale) | {"random_weights": order.base is None}, "parts": {},
    }  # fmt: skip


def _run(part: Part, order: Order, work: Path, limit: float) -> dict[str, Any]:
    """Run a part within `limit` seconds; return what it measured, and why it did not come to its end."""
    out, log = work / f"{part.name}.json", work / f"{part.name}.log"
    if part.name == "doctor":
        status = run_process([sys.executable, "-m", "fast_ft", "doctor", "--json"], log, limit, out)
        found, status = _kept(out), 0 if status == 3 else status  # 3: something is broken, which the findings say
    else:
        job = {"part": part.name, "out": str(out), "work": str(work), "base": order.base, "scale": asdict(order.scale)}
        file = work / f"{part.name}.job.json"
        file.write_text(json.dumps(job | {"started": time.monotonic()}), encoding="utf-8")
        status = run_process([sys.executable, "-m", "bench.card_parts", str(file)], log, limit)
        found = _kept(out)
    return found if status == 0 else found | {"failed": _ended(status, limit, log)}


def _ended(status: int | str, limit: float, log: Path) -> str:
    """Return in one line why a process did not come to its end."""
    if isinstance(status, str):
        return f"not done after {limit:.0f} s"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return f"status {status}: {lines[-1][:300]}"


def _kept(path: Path) -> dict[str, Any]:
    """Return what a part kept; nothing where it kept none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
