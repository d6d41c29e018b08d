"""Bad numbers: steps without a finite loss or finite gradients are counted; after too many, training goes back once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rewind:
    """Where training goes back to after bad numbers, which began at step `first_bad`.

    It goes back to the newest checkpoint of a step below `before`, or to the adapter as it was before the first step.
    """

    first_bad: int
    before: int


class BadStepWatch:
    """Watches the steps' losses and gradients. After `limit` bad steps in a row the numbers count as diverged."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.broken = False  #: the last step's loss was no finite number
        self.diverged = False
        self._bad: list[int] = []  # the latest steps in a row that were skipped or had a loss that is no number
        self._good = 0  # the latest step after which the weights are known to be good

    @property
    def is_calm(self) -> bool:
        """Whether the latest step was good, and one bad step alone decides nothing."""
        return not self._bad and self.limit > 1

    @property
    def is_counting(self) -> bool:
        """Whether the latest step was bad."""
        return bool(self._bad)

    def see(self, entry: Mapping[str, Any], *, is_last: bool) -> None:
        """Take note of a step's line in the log."""
        self.broken = not math.isfinite(entry["loss"])
        self._bad = [*self._bad, entry["step"]] if entry["skipped"] or self.broken else []
        self.diverged = len(self._bad) >= self.limit or (self.broken and is_last)

    def rewind(self) -> Rewind:
        """Return where to go back to, and begin to watch again.

        The weights after a step are first used in the step after it. So the state after a step counts as good where
        that next step's loss was a number.
        """
        first = self._bad[0]
        self._bad, self.broken, self.diverged = [], False, False
        self._good = max(self._good, first - 2)
        return Rewind(first, before=self._good + 1)
