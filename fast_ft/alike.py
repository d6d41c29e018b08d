"""Where several processes train one course: they start alike, decide alike, and are found to have stayed alike.

Each function is called by all of them at the same point, and does nothing for one process alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fast_ft.progress import note

if TYPE_CHECKING:
    from fast_ft.train import Course


def start(course: Course) -> None:
    """Put every process where the first one is: its weights, its optimizer, its progress."""
    if course.ranks.size == 1:
        return
    import torch

    state = course.optimizer.state_dict()
    weights, moments, course.progress = course.ranks.share(
        (course.flat.parameter.detach().cpu(), _on_cpu(state["state"]), course.progress)
    )
    if not course.ranks.first:
        with torch.no_grad():
            course.flat.parameter.copy_(weights)
        course.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def agree(course: Course) -> None:
    """Settle whether to stop: where any process was asked to, or the first one's clock says so, or its pace."""
    at, pace = course.progress, course.pace
    up = pace is not None and (pace.left() <= 0 or (at.stop_at is not None and at.global_step >= at.stop_at))
    said = course.ranks.most([course.asked > 0, up, at.anneal_from, at.stop_at or 0])
    course.interrupted, course.time_is_up = bool(said[0]), bool(said[1])
    at.anneal_from, at.stop_at = said[2], said[3] or None


def check(course: Course) -> None:
    """Warn where the processes' weights have come apart, which equal sums on equal cards cannot do."""
    import torch

    if course.ranks.size == 1:
        return
    bits = int(course.flat.parameter.detach().float().view(torch.int32).sum(dtype=torch.int64))
    most, least = course.ranks.most([bits, -bits])
    if most != -least:
        course.notes.append(f"after step {course.progress.global_step} the processes' weights are not equal to the bit")
        note(f"warning: {course.notes[-1]}")


def _on_cpu(value: Any) -> Any:
    """Return an optimizer's state with its tensors on the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value.cpu() if hasattr(value, "cpu") else value
