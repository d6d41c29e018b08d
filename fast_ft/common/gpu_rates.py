"""How fast the GPU and the host of this process are, measured in under two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_AGREE = 0.02  #: two windows within this share of each other end a measurement
_MOST_WINDOWS = 8
_WINDOW_SECONDS = 0.1


@dataclass(frozen=True)
class MeasuredRates:
    """TFLOP/s of a large fp16 product, GB/s of a copy (read plus written), host seconds to launch a small kernel."""

    tflops: float
    gb_per_s: float
    launch_seconds: float


def measure() -> MeasuredRates | None:
    """Measure this process's GPU and host, on the current stream; None without a GPU."""
    flops = matmul_tflops()
    if flops is None:
        return None
    import torch

    found = MeasuredRates(flops, copy_gb_per_s(), launch_seconds())
    torch.cuda.empty_cache()  # what was copied
    return found


def matmul_tflops() -> float | None:
    """Return TFLOP/s of an fp16 product of two 4,096 x 4,096 matrices, settled; None without a GPU.

    A card that clocks down within the first second is measured after that. One that slows down after more seconds, as
    a T4 of 70 W does, is not: cards.json says what such a card keeps up.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    return 2 * 4096**3 / settled(_windows(lambda: a @ a)) / 1e12


def copy_gb_per_s() -> float:
    """Return GB/s of the GPU's memory in a copy of 128 MiB, read plus written."""
    import torch

    source = torch.zeros(2**26, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / settled(_windows(lambda: target.copy_(source))) / 1e9


def launch_seconds() -> float:
    """Return the seconds that this host takes to launch a small kernel: the least of five bursts, none waited for."""
    import torch

    small = torch.zeros(8, device="cuda")
    bursts = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            small.add_(1)
        bursts.append((time.perf_counter() - started) / 200)
    torch.cuda.synchronize()
    return min(bursts)


def settled(windows: Iterator[float]) -> float:
    """Return the first of `windows` that agrees with the one before it, or the slowest of the first eight.

    Each is the mean seconds of one piece of work. A card that gets faster or slower as it warms up is waited for.
    """
    seen = [next(windows)]
    for each in windows:
        if abs(each - seen[-1]) <= _AGREE * seen[-1]:
            return each
        seen.append(each)
        if len(seen) == _MOST_WINDOWS:
            break
    return max(seen)


def _windows(work: Callable[[], object]) -> Iterator[float]:
    """Yield the mean seconds of one `work`, window after window; the first calls warm up."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(times: int) -> float:
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    seconds(3)
    times = max(1, min(400, int(_WINDOW_SECONDS / seconds(3))))
    while True:
        yield seconds(times)
