"""The figure of a T4's kernels, executed on another card: tests/gpu/test_sm75.py writes the raw result."""

from __future__ import annotations

from typing import Any


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the figure of a T4's kernels that ran as sm_75 on another card; nothing where any test failed."""
    wanted, executed = set(result["on_a_t4"]), set(result["executed"])
    if result["failed"] or not wanted <= executed:
        return {}
    unit = f"of {len(wanted)} kernels that a T4 runs, executed as sm_75 and equal to torch, and whole runs"
    return {"t4.kernels_executed": (float(len(wanted & executed)), unit)}
