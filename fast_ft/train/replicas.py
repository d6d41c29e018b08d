"""Where several processes train one course: they start alike, decide alike, and are found to have stayed alike.

Each function is called by all of them at the same point, and does nothing for one process alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common.console import note
from fast_ft.train import state

if TYPE_CHECKING:
    from fast_ft.train.session import Course


def start(course: Course) -> None:
    """Let every process go on from the first one's state, as from a checkpoint."""
    if course.ranks.size == 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if course.ranks.first:
            state.save(root, course.loaded.model, course.optimizer, course.progress)
        for name in state.FILES:
            data = course.ranks.share_bytes((root / name).read_bytes() if course.ranks.first else b"")
            if not course.ranks.first:
                (root / name).write_bytes(data)
        if not course.ranks.first:
            course.resume(root)


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
