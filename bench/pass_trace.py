"""A pass taken apart on a card: which lines of code hold memory at its peak, and which kernels its time goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(work: Callable[[], object], most: int = 40) -> dict[str, Any]:
    """Return what lived at the peak of the memory that `work` allocates: MiB, blocks and line of code.

    A block counts for the innermost two lines of fast_ft's own code that allocated it.
    """
    import torch

    there = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=400_000)
    try:
        work()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    events = [each for trace in snapshot["device_traces"] for each in trace]
    live: dict[int, tuple[int, str]] = {}
    total = best = there
    at_peak: dict[int, tuple[int, str]] = {}
    for event in sorted(events, key=lambda each: each["time_us"]):
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _place(event.get("frames", [])))
            total += event["size"]
            if total > best:
                best, at_peak = total, dict(live)
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= live.pop(event["addr"])[0]
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for size, place in at_peak.values():
        sizes[place] += size
        counts[place] += 1
    lines = [[round(size / 2**20, 2), counts[place], place] for place, size in sizes.most_common(most)]
    return {"there_mib": round(there / 2**20, 2), "peak_mib": round(best / 2**20, 2), "by_line": lines}


def kernels(work: Callable[[], object], most: int = 30) -> dict[str, Any]:
    """Return the kernels that `work` runs: milliseconds, calls and name, the longest first."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda each: -each.device_time_total)
    listed = [[round(each.device_time_total / 1e3, 3), each.count, each.key[:90]] for each in found[:most]]
    total = sum(each.device_time_total for each in found) / 1e3
    return {"milliseconds": round(total, 3), "calls": sum(each.count for each in found), "by_kernel": listed}


def _place(frames: list[dict[str, Any]]) -> str:
    own = [each for each in frames if "fast_ft" in each["filename"] and "bench" not in each["filename"]]
    return " < ".join(f"{Path(each['filename']).name}:{each['line']} {each['name']}" for each in (own or frames)[:2])
