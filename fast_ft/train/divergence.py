"""Bad numbers: steps without a finite loss or finite gradients are counted; after too many, training goes back once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.console import note
from fast_ft.train import replicas, state
from fast_ft.train.optimizer import make_optimizer

if TYPE_CHECKING:
    from fast_ft.train.session import Course


class Setbacks:
    """Watches a course's steps. `most`: bad steps in a row after which its numbers count as lost (`diverged`)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.broken = False  #: the last step's loss was no number
        self.diverged = False
        self.last_good: Callable[[int], Path | None] | None = None  #: the newest checkpoint before a step
        self.on_back: Callable[[int], None] | None = None  #: is told the step after which training goes on again
        self.gave_up = False  #: bad numbers came twice; the last good state is the end
        self._bad: list[int] = []  # the latest steps in a row that were skipped or had a loss that is no number
        self._good = 0  # the latest step after which the weights are known to be good
        self._start: Any = None  # the adapter before the first step

    def begin(self, course: Course) -> None:
        """Keep the adapter as it is before the first step, unless that was taken earlier."""
        if course.progress.global_step == 0:
            self._start = course.flat.parameter.detach().cpu().clone()

    def forget(self) -> None:
        """Let go of the adapter as it was, and of who is told."""
        self._start = self.last_good = self.on_back = None

    def stepped(self, entry: dict[str, Any], *, last: bool) -> None:
        """Take note of a step's line in the log; `last`: none comes after it."""
        self.broken = not math.isfinite(entry["loss"])
        self._bad = [*self._bad, entry["step"]] if entry["skipped"] or self.broken else []
        self.diverged = len(self._bad) >= self.most or (self.broken and last)

    def go_back(self, course: Course) -> None:
        """Go back to the last good state and halve the learning rate; the second time that is the end.

        A state counts as good where a later step's loss was a number: weights are first seen in the step after theirs.
        """
        import torch

        first, seconds, again = self._bad[0], course.progress.seconds, course.progress.rate_factor < 1
        self._bad, self.broken, self.diverged = [], False, False
        self._good = max(self._good, first - 2)
        good = self.last_good(self._good + 1) if self.last_good is not None else None
        course.optimizer = make_optimizer(course.flat, course.section)
        course.progress = state.Progress()
        if good is not None:
            course.resume(good)
        elif self._start is not None:
            with torch.no_grad():
                course.flat.parameter.copy_(self._start)
        else:
            again = True  # a resumed run whose only checkpoint was bad: there is nothing to go on from
        self.gave_up = course.ranks.share(again)
        replicas.start(course)
        course.progress.seconds, course.progress.rate_factor = seconds, 0.5
        at = course.progress.global_step
        if self.on_back is not None:
            self.on_back(at)
        what = "that is the end" if self.gave_up else "the learning rate is halved from there"
        course.notes.append(
            f"no finite loss or gradients from step {first} on: back to the state after step {at}; {what}"
        )
        note(f"warning: {course.notes[-1]}")
