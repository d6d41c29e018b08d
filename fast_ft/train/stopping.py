"""When training stops before its last step: a signal asks for it, or a budget of minutes is used up."""

from __future__ import annotations

import time

from fast_ft.common.console import note
from fast_ft.common.minutes import TrainPace
from fast_ft.common.process_group import Ranks
from fast_ft.train.state import TrainState

_ONE_REQUEST = 3.0  #: seconds: a terminal's Ctrl-C comes from the terminal, and once more from the launcher


class Stopping:
    """Decides for all processes (`ranks`) whether training stops after the step in hand.

    `pace` counts the minutes, and keeps budget.train_minutes where there is one. Only process 0 has a pace.
    """

    def __init__(self, ranks: Ranks, pace: TrainPace | None) -> None:
        self.ranks, self.pace = ranks, pace
        self.interrupted = False  #: one of the processes was asked to stop
        self.time_is_up = False  #: by the budget
        self._asked = 0.0  # when this process was asked to stop
        self._is_forecast = False  # that the budget will not do was said

    def ask(self) -> None:
        """End the run after the step in hand, its state saved; asked a second time, at once.

        Raises:
            KeyboardInterrupt: It was asked a second time.
        """
        now = time.monotonic()
        if self._asked and (self.ranks.size == 1 or now - self._asked > _ONE_REQUEST):
            raise KeyboardInterrupt
        self._asked = self._asked or now
        note("stopping after this step; its state is saved. Once more stops at once.")

    def is_up(self, at: TrainState) -> bool:
        """Return whether this process's clock, or the step at which the learning rate is down, ends the training."""
        pace = self.pace
        return pace is not None and (pace.left() <= 0 or (at.stop_at is not None and at.global_step >= at.stop_at))

    def agree(self, at: TrainState, *, is_up: bool) -> None:
        """Agree with the other processes on whether training stops, and on where the learning rate goes down (`at`).

        `is_up` is what this process has found.
        """
        said = self.ranks.most([self._asked > 0, is_up, at.anneal_from, at.stop_at or 0])
        self.interrupted, self.time_is_up = bool(said[0]), bool(said[1])
        at.anneal_from, at.stop_at = said[2], said[3] or None

    def is_near(self, at: TrainState) -> bool:
        """Return whether training may stop, or the learning rate go down, after one of the next two steps."""
        pace = self.pace
        return self._asked > 0 or (pace is not None and (at.stop_at is not None or not pace.is_ample(at.global_step)))

    def count_time(self, at: TrainState, *, is_newest: bool = True) -> str | None:
        """Count a finished step's time, and let the learning rate go down (`at`) where time is running out.

        That begins at the newest step that was launched. Where training will take longer than the budget it says so,
        once, and returns what it said.
        """
        pace = self.pace
        if pace is None:
            return None
        pace.step(at.global_step)
        at.seconds, at.minutes = pace.elapsed(), pace.minutes
        warning = None if self._is_forecast else pace.forecast(at.global_step)
        if warning:
            self._is_forecast = True
            note(f"warning: {warning}")
        if is_newest and at.stop_at is None and (over := pace.anneal(at.global_step)) is not None:
            at.anneal_from, at.stop_at = at.global_step, at.global_step + over
            if over:
                note(f"time is running out: the learning rate goes down over the last steps that fit: {over}")
            else:
                note("time is up: no other step fits, and the learning rate could not be brought down")
        return warning

    def count_measurement(self, at: TrainState, *, is_last: bool) -> None:
        """Count the time in which the validation loss was measured behind the step that was counted last.

        `is_last`: none is to come, and steps have all of the time.
        """
        if self.pace is not None:
            if is_last:
                self.pace.measure_no_more()
            self.pace.measure()
            at.seconds = self.pace.elapsed()
