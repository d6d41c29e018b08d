"""Time and memory of a card, read the same way everywhere."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

from fast_ft.hub import families


def clock(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes, the card waited for before and after."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def out_of_memory_is_a_result(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what `work` returns, or {"out_of_memory": True} where the card's memory did not suffice."""
    import torch

    try:
        return work(*given)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def reset_peak() -> None:
    """Begin to count the card's peak memory again, with the allocator's cache emptied."""
    import torch

    if torch.cuda.is_available():
        empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(context: float) -> float:
    """Return the GiB reserved at most since `reset_peak`, plus `context` GiB for the CUDA context; 0 without a card."""
    import torch

    return round(torch.cuda.max_memory_reserved() / families.GIB + context, 2) if torch.cuda.is_available() else 0.0


def empty_cache() -> None:
    """Give memory that nothing uses back to the card."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)
