"""What a card sustains, which no emulation tells: products until the rate stops falling, memory, kernel launches.

Also how long its 4-bit products take, by each kernel that may run there, beside bitsandbytes' own.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

from bench.card_scale import Scale
from bench.clock import clock
from fast_ft.generate.engine import product_times

_SETTLED = 0.01  #: a rate has stopped falling where two halves of the last windows are this close
_STATE = ("clocks.sm", "temperature.gpu", "power.draw", "power.limit", "pstate")
_LOOKED_AT = 20  #: windows
_PRODUCTS = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  #: (outputs, inputs) of a 7B's layer


def measure(scale: Scale, keep: Callable[[str, Any], None]) -> None:
    """Keep GB/s of a copy, launches a second, each window's TFLOP/s, and times of 4-bit products."""
    keep("gb_per_s", round(copy_rate(scale.copied), 1))
    keep("launches_per_s", round(launch_rate(scale.launches)))
    keep("matrix", scale.matrix)
    keep("before", state())
    sustained(scale, keep)
    keep("after", state())
    if _device() == "cuda":
        keep("products", product_times.time_products(_PRODUCTS, (1, 16, 64), "float16", "cuda:0"))


def state() -> dict[str, str] | None:
    """Return the card's clock, temperature and power as nvidia-smi has them: why it slows down. None without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = (done.stdout.splitlines() or [""])[0]
    return dict(zip(_STATE, (each.strip() for each in first.split(",")), strict=False))


def copy_rate(numbers: int) -> float:
    """Return the GB/s, read plus written, at which this number of 16-bit numbers is copied; the median of 10 copies."""
    import torch

    source = torch.zeros(numbers, device=_device(), dtype=torch.float16)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(clock(lambda: target.copy_(source)) for _ in range(10))
    return 2 * 2 * numbers / seconds / 1e9


def launch_rate(count: int) -> float:
    """Return how many tiny kernels the host launches in a second, one behind the other."""
    import torch

    one = torch.zeros(1, device=_device())

    def launch() -> None:
        for _ in range(count):
            one.add_(1)

    launch()
    return count / clock(launch)


def sustained(scale: Scale, keep: Callable[[str, Any], None]) -> None:
    """Keep the TFLOP/s of fp16 products, window by window, until they stop falling: a small card slows down.

    It takes from `scale.least` to `scale.most` seconds; "settled" says whether the rate stood still at the end.
    """
    import torch

    kind = torch.float16 if torch.cuda.is_available() else torch.float32
    a = torch.randn(scale.matrix, scale.matrix, device=_device()).to(kind)
    b, out = a.clone(), torch.empty_like(a)
    each = min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(4))  # the first one loads cuBLAS
    count = max(1, round(scale.window / each))

    def window() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    rates: list[float] = []
    started = time.monotonic()
    while (spent := time.monotonic() - started) < scale.most and not (spent >= scale.least and settled(rates)):
        rates.append(round(count * 2 * scale.matrix**3 / clock(window) / 1e12, 4))
        keep("tflops", rates)
    keep("seconds", round(spent, 1))
    keep("settled", settled(rates))


def settled(rates: list[float]) -> bool:
    """Return whether the last windows' rates stand still: their later half is no slower than the half before."""
    if len(rates) < _LOOKED_AT:
        return False
    before, after = rates[-_LOOKED_AT : -_LOOKED_AT // 2], rates[-_LOOKED_AT // 2 :]
    return statistics.median(after) >= (1 - _SETTLED) * statistics.median(before)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
