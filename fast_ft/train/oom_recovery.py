"""A thriftier plan where memory runs out, and how long the steps to come will take. Pure: the session applies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fast_ft.plan.cost_model import STEP_SECONDS
from fast_ft.plan.micro_batches import cut
from fast_ft.plan.plans import shares_of, widths_of
from fast_ft.plan.run_plan import TrainPlan


def thriftier(plan: TrainPlan, steps: Sequence[Sequence[int]], layers: int) -> TrainPlan | None:
    """Return a plan that takes less memory, or None where there is none; `steps` are the token counts of their rows.

    Passes become smaller first, down to the longest row; then graphs go; then all `layers` are computed again in the
    backward pass.
    """
    longest = max(max(lengths) for lengths in steps)
    now = max(
        sum(lengths[i] for i in piece)
        for step_lengths in steps
        for lengths in shares_of(plan, step_lengths)
        for piece in cut(lengths, most_rows=plan.micro_batch, most_tokens=plan.most_tokens)
    )
    if now > longest:
        return replace(plan, most_tokens=max(longest, now * 3 // 4))
    if plan.capture:
        return replace(plan, capture=False)
    if plan.recompute_layers < layers:
        return replace(plan, recompute_layers=layers)
    return None


def widths_to_come(plan: TrainPlan, steps: Sequence[Sequence[int]], rank: int) -> list[list[int]]:
    """Return for each step the widths of this process's passes; `steps` are the token counts of their rows."""
    return [widths_of(plan, shares_of(plan, step)[rank]) for step in steps]


def predicted_seconds(widths: Sequence[Sequence[int]], seconds: Mapping[int, float]) -> float:
    """Return how many seconds steps with passes of these widths will take.

    `seconds` are measured, by width. The widest pass alone was run: a narrower one takes its share.
    """
    widest = max(seconds)
    total = sum(seconds.get(each, seconds[widest] * each / widest) for step in widths for each in step)
    return total + len(widths) * STEP_SECONDS
