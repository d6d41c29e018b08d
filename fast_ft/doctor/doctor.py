"""`python -m fast_ft doctor`: driver, card, versions, room, network, kernels, a small run; each with its remedy."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fast_ft.common import environment, gpu, host_memory
from fast_ft.common.redaction import redacted
from fast_ft.doctor import child, kernels, measured, versions
from fast_ft.doctor.findings import Finding
from fast_ft.hub.families import GIB

SECONDS = 2.0  #: for an address to answer
TRIAL_SECONDS = 300  #: with a GPU the first kernels are compiled
#: GiB: what LLaMA2-7B in 4 bits takes to download (3.9 GB) with room to move, and a run's files.
DISK_FOR_7B, DISK_FOR_RUN = 6.0, 1.0
#: GiB of host memory: a 7B is read in pieces; the quickstart needs torch and little else.
MEMORY_FOR_7B, MEMORY_FOR_POCKET = 6.0, 1.5


def examine() -> list[Finding]:
    """Look at everything, the slow parts at the same time, and return what was found."""
    card = gpu.gpu()
    with ThreadPoolExecutor(3) as pool:
        tested = pool.submit(lambda: list(self_test()))
        checked = pool.submit(lambda: list(kernels.examine(card)))
        asked = pool.submit(lambda: _looked_at("network", network))
        here = [
            *_python(), *_card(card), *versions.against_pins(card is not None), *versions.known_pairs(card is not None),
            *_looked_at("room", lambda: _room(card)), *_looked_at("GPU memory", lambda: _room_on_card(card)),
            *measured.examine(card),
        ]  # fmt: skip
        return [*here, *asked.result(), *tested.result(), *checked.result()]


def _looked_at(name: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return what a look finds; where a package is not installed that it needs, what to install."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except ImportError as error:
        text = f"cannot be looked at: {redacted(str(error))}"
        found.append(Finding(name, "broken", text, versions.install(gpu=False)))
    return found


def _python() -> Iterator[Finding]:
    version, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding("Python", "fine", f"{version}, {system}, {os.cpu_count()} CPU threads")
    else:
        yield Finding("Python", "broken", f"{version}; 3.11 or 3.12 is needed", "install one, and run make again")


def _card(card: dict[str, str] | None) -> Iterator[Finding]:
    """Yield driver, CUDA and compute capability, as nvidia-smi and torch see them."""
    if card is None:
        text = "nvidia-smi finds no NVIDIA GPU: runs go through PEFT on the CPU, which the quickstart is for"
        yield Finding("GPU", "note", text, "a 7B needs one; on Colab: Runtime > Change runtime type > T4 GPU")
        return
    yield Finding("GPU", "fine", f"{card['name']}, {card['memory']}, driver {card['driver']}")
    try:
        import torch
    except ImportError as error:
        yield Finding("CUDA", "broken", f"torch does not import: {error}", versions.install(gpu=True))
        return
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        remedy = "update the driver" if torch.version.cuda else "install the CUDA build of torch with pip"
        yield Finding("CUDA", "broken", f"torch {torch.__version__}, built {build}, does not see the GPU", remedy)
        return
    capability = torch.cuda.get_device_capability()
    text = f"CUDA {torch.version.cuda}, compute capability {capability[0]}.{capability[1]}"
    if capability < (7, 0):
        yield Finding("CUDA", "warning", f"{text}: below 7.0 nothing was tried", "take a T4 or a newer card")
    else:
        kind = "bfloat16" if capability >= (8, 0) else "no bfloat16, so runs use float16"
        yield Finding("CUDA", "fine", f"{text}: {kind}")


def _room(card: dict[str, str] | None) -> Iterator[Finding]:
    """Yield free memory of the host, and free disk here and where models are kept."""
    from huggingface_hub import constants

    free = host_memory.free_bytes() / GIB
    needed = MEMORY_FOR_7B if card else MEMORY_FOR_POCKET
    yield _amount("memory", f"{free:.1f} GiB of host memory free", free, needed, "end what else runs here")
    cache = Path(constants.HF_HUB_CACHE).absolute()
    places = {"disk": (Path.cwd(), DISK_FOR_RUN, "free some, or choose another output_dir")}
    if card:
        places["hub cache"] = (cache, DISK_FOR_7B, "free some, or point HF_HOME at a larger disk")
    for name, (place, least, remedy) in places.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        room = shutil.disk_usage(there).free / GIB
        text = f"{room:.0f} GiB free" if os.access(there, os.W_OK) else f"{there} cannot be written"
        yield _amount(name, text, room if os.access(there, os.W_OK) else 0.0, least, remedy)


def _room_on_card(card: dict[str, str] | None) -> Iterator[Finding]:
    """Yield free memory of the card, where torch sees it."""
    if card and (free := gpu.free_gpu_gib()) is not None:
        remedy = "end what else uses the card (nvidia-smi lists it)"
        yield _amount("GPU memory", f"{free:.1f} GiB free", free, 6.0, remedy)


def _amount(name: str, text: str, value: float, least: float, remedy: str) -> Finding:
    if value >= least:
        return Finding(name, "fine", text)
    return Finding(name, "warning", f"{text}; {least:g} GiB are wanted", remedy)


def network(ask: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Yield whether the hub and the package index answer within SECONDS; both are asked at once."""
    from huggingface_hub import constants

    addresses = {"hub": constants.ENDPOINT, "package index": _index()}
    if constants.HF_HUB_OFFLINE:
        del addresses["hub"]
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: not asked; what is in the cache is used")
    answers: dict[str, str] = {}

    def answer(name: str, url: str) -> None:
        """Note whether an address answered, or the kind of error."""
        try:
            (ask or _ask)(url)
            answers[name] = ""
        except Exception as error:  # every library of the network has its own
            answers[name] = type(error).__name__

    threads = [threading.Thread(target=answer, args=pair, daemon=True) for pair in addresses.items()]
    until = time.monotonic() + SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:  # a name server may take longer than any time-out of ours
        thread.join(max(0.0, until - time.monotonic()))
    for name in addresses:
        why = answers.get(name, f"no answer within {SECONDS:g} s")
        if not why:
            yield Finding(name, "fine", "reachable")
        else:
            use = "models and data in folders still work" if name == "hub" else "what is installed still works"
            yield Finding(name, "note", f"not reachable ({why}): {use}", "check network and proxy before a download")


def _ask(url: str) -> None:
    import httpx

    httpx.head(url, timeout=SECONDS, follow_redirects=False)  # any answer will do


def _index() -> str:
    """Return the package index that pip asks."""
    if given := environment.pip_index():
        return given
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def self_test() -> Iterator[Finding]:
    """Train and decode a little in a process of its own, and yield what came of it."""
    started = time.monotonic()
    done = child.run("fast_ft.doctor.smoke_run", TRIAL_SECONDS)
    if done.status is None:
        yield Finding("self-test", "broken", f"not done after {TRIAL_SECONDS} s", "try again while nothing else runs")
        return
    if done.status:
        text = redacted(f"status {done.status}: {done.last_line}")
        remedy = "mend what is broken above; else see it whole: python -m fast_ft.doctor.smoke_run"
        yield Finding("self-test", "broken", text, remedy)
        return
    result = json.loads(done.out.splitlines()[-1])
    yield from judged(result, time.monotonic() - started)
    slower = [line for line in done.errors.splitlines() if "more slowly" in line]
    yield from (Finding("self-test", "warning", redacted(line), "see Versions above") for line in slower)


def judged(result: dict[str, Any], seconds: float) -> Iterator[Finding]:
    """Yield what the smoke run's facts mean: the loss should fall, and tokens should come.

    result: of doctor/smoke_run.py. seconds: all that it took, imports included.
    """
    first, last = result["losses"]
    text = (
        f"{result['steps']} steps through {result['backend']} in {result['dtype']} in {result['train_seconds']:.1f} s "
        f"(loss {first:.2f} in the first of them, {last:.2f} in the last), {result['tokens']} tokens in "
        f"{result['decode_seconds']:.1f} s; with imports {seconds:.0f} s"
    )
    sound = result["tokens"] > 0 and last < first  # no NaN is below anything
    remedy = "" if sound else "the loss should fall: compare versions, then report it with this output"
    yield Finding("self-test", "fine" if sound else "broken", text, remedy)
