"""Does the plan fit the card? Found out before the first step, and mended where memory runs out all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.plan.cost_model import STEP_SECONDS
from fast_ft.plan.micro_batches import cut
from fast_ft.plan.plans import shares_of, widths_of

if TYPE_CHECKING:
    from fast_ft.train.session import Course


def rehearse(course: Course) -> None:
    """On a card, run a pass of each width that is to come, once for all stages: it fits, and how long it takes.

    Graphs are captured here, before the first step. Called in on_train_begin: Unsloth compiles anew after a pass that
    came before.
    """
    if course.rehearsed or course.loaded.device != "cuda":
        return
    import torch

    jobs, at = course.jobs[course.progress.stage :], course.progress.step
    steps = [step for job in jobs for step in job.lengths][at:]
    while not course.rehearsed:
        widths = [widths_of(course.plan, shares_of(course.plan, step)[course.ranks.rank]) for step in steps]
        short: Exception | None = None
        try:
            seconds = course.passes.rehearse({each for step in widths for each in step})
        except torch.OutOfMemoryError as error:
            short = error.with_traceback(None)  # which would hold the activations
        course.rehearsed = not course.ranks.any(short is not None)
        if not course.rehearsed:
            shrink(course, short, course.progress.global_step + 1)
    if not seconds:  # fewer rows in a step than processes
        return
    widest = max(seconds)  # without graphs the only one
    total = sum(seconds.get(each, seconds[widest] * each / widest) for step in widths for each in step)
    minutes = (total + len(steps) * STEP_SECONDS) / 60
    note(f"{len(steps)} steps: {minutes:.1f} minutes, by passes measured just now")


def shrink(course: Course, error: Exception | None, step: int) -> None:
    """Settle for a thriftier plan after an out-of-memory error: smaller passes, then no graphs, then recomputation.

    InputError where there is none. `error` is None where another process had it; all settle for the same.
    """
    import torch

    plan = course.plan
    longest = max(len(row.input_ids) for job in course.jobs for row in job.rows)
    steps = [step for job in course.jobs for step in job.lengths]
    pieces = (
        (lengths, piece)
        for step_lengths in steps
        for lengths in shares_of(plan, step_lengths)
        for piece in cut(lengths, most_rows=plan.micro_batch, most_tokens=plan.most_tokens)
    )
    now = max(sum(lengths[i] for i in piece) for lengths, piece in pieces)
    layers = len(course.loaded.model.get_base_model().model.layers)
    if now > longest:
        plan = replace(plan, most_tokens=max(longest, now * 3 // 4))
    elif plan.capture:
        plan = replace(plan, capture=False)
    elif plan.recompute_layers < layers:
        plan = replace(plan, recompute_layers=layers)
    else:
        raise InputError(
            f"out of memory with one row at a time, at step {step}. Lower model.max_length or lora.r, set "
            "train.gradient_checkpointing: true, or free the card."
        ) from error
    course.plan = plan
    course.out_of_memory += 1
    course.loaded.model.zero_grad()
    course.passes.reshape(capture=plan.capture, recompute_layers=plan.recompute_layers)
    if course.loaded.device == "cuda":
        torch.cuda.empty_cache()
    note(
        f"out of memory: step {step} is done again with at most {plan.most_tokens} tokens in a pass, "
        f"{plan.recompute_layers} layers computed again, {'with' if plan.capture else 'without'} graphs"
    )
    if course.on_settled is not None:
        course.on_settled(plan)
