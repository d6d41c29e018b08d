"""Budgets of minutes: how many steps still fit at the speed that training shows, and the clock of the answers.

Training that will not make it anneals its learning rate to nothing over the last steps that fit, and ends there.
Answers that will not make it are cut by generate/pace.py. Clocks are passed in, in seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]

ANNEAL = 0.2  #: share of all steps over which a learning rate that has to end early goes down
RESERVE = 0.02  #: share of the minutes kept for saving what was trained
_FIRST = 3  #: training steps before their speed is believed


def longer(now: float | None, then: float | None) -> bool:
    """Return whether the budget `now` allows more minutes than the budget `then`; None is no limit."""
    return then is not None and (now is None or now > then)


@dataclass(frozen=True)
class Measurements:
    """The validation loss that training measures: the rows' tokens, and the steps (from 1) after which it is due.

    It is also due where training ends early.
    """

    tokens: int = 0
    after: frozenset[int] = frozenset()

    @classmethod
    def over(cls, lengths: Sequence[int], stage_steps: Sequence[int], every: int | None) -> Measurements:
        """Return those over rows of these token counts: at the end of each stage, and after every `every` steps.

        `stage_steps` are the steps of each stage; None for `every`: at stages' ends only. Without rows there are none.
        """
        if not lengths:
            return cls()
        between = range(every, sum(stage_steps), every) if every else ()
        return cls(sum(lengths), frozenset([*itertools.accumulate(stage_steps), *between]))


class TrainPace:
    """Training's minutes (None: no limit, they are only counted). `tokens` are those of every step of the run.

    `spent`: seconds of earlier sessions. `measurements` take their share of the minutes.
    """

    def __init__(
        self,
        minutes: float | None,
        tokens: Sequence[int],
        clock: Clock,
        *,
        spent: float = 0.0,
        since: float | None = None,
        measurements: Measurements = Measurements(),
    ) -> None:
        self.minutes, self.tokens, self.clock, self.measurements = minutes, tokens, clock, measurements
        self._began = (clock() if since is None else since) - spent
        self._steps: list[tuple[int, float]] = []  # of this session: tokens, seconds
        self._last = clock()
        self._measured: float | None = None  # seconds of the latest measurement

    def elapsed(self) -> float:
        """Seconds of training so far, those of earlier sessions and of loading the model among them."""
        return self.clock() - self._began

    def start(self) -> None:
        """The first step of a session, or the first after a checkpoint was loaded, begins now."""
        self._last = self.clock()

    def step(self, number: int) -> None:
        """Note that step `number`, counted from 1 over all stages, has ended."""
        now = self.clock()
        self._steps.append((self.tokens[number - 1], now - self._last))
        self._last = now

    def measure(self) -> None:
        """Note that the validation loss was measured behind the step that was noted last."""
        now = self.clock()
        self._measured, self._last = now - self._last, now

    def measure_no_more(self) -> None:
        """Note that no measurement is to come: steps have all of the time."""
        self.measurements = Measurements()

    def left(self) -> float:
        """Seconds in which steps may still end, so that there is time to measure the validation loss behind them."""
        return self._time() - self._pause()

    def seconds(self, first: int, last: int) -> float:
        """Seconds that steps `first` (counted from 0) to `last` (not included) will take, by the latest ones."""
        return self._rate() * sum(self.tokens[first:last])

    def fitting(self, done: int) -> int | None:
        """Return how many steps still fit after `done`, which is not yet measured; None while that cannot be told."""
        if not self._is_believed():
            return None
        rate, pause, last = self._rate(), self._pause(), done
        left = self._time() - pause  # wherever training ends it measures
        while last < len(self.tokens):
            left -= rate * self.tokens[last] + (pause if last in self.measurements.after else 0.0)
            if left < 0:
                break
            last += 1
        return last - done

    def anneal(self, done: int) -> int | None:
        """Return over how many steps the learning rate has to go down from now on, or None: not yet, or not at all.

        0: no other step fits.
        """
        fitting = self.fitting(done)
        if fitting is None or done + fitting >= len(self.tokens) or fitting > ANNEAL * (done + fitting):
            return None
        return fitting

    def is_ample(self, done: int) -> bool:
        """Return whether the steps after `done` will all end in time, though they took a quarter longer; else False."""
        if self.minutes is None:
            return True
        return self.fitting(done) is not None and 1.25 * self._needed(done) < self._time()

    def forecast(self, done: int) -> str | None:
        """Return a sentence that says what will happen to a run that does not fit, and what would. None: it fits."""
        fitting, total = self.fitting(done), len(self.tokens)
        if fitting is None or done + fitting >= total:
            return None
        needed = (self.elapsed() + self._needed(done)) / 60 / (1 - RESERVE)
        last = done + fitting
        how = "its learning rate brought down early" if fitting else "its learning rate not brought down"
        measuring = self._pause() * self._due(done) / 60
        share = f", {measuring:.3g} of them to measure the validation loss" if measuring else ""
        return (
            f"training will take about {needed:.3g} minutes{share}, budget.train_minutes is {self.minutes:g}: it will "
            f"end after about step {last} of {total}, {how}. What would fit: "
            f"train.max_steps={last}, or budget.train_minutes={needed * 1.05:.3g}"
        )

    def _time(self) -> float:
        """Seconds of the budget that are left for steps and measurements."""
        return math.inf if self.minutes is None else self.minutes * 60 * (1 - RESERVE) - self.elapsed()

    def _needed(self, done: int) -> float:
        """Seconds of all that is to come after `done`, which is not yet measured."""
        return self.seconds(done, len(self.tokens)) + self._pause() * self._due(done)

    def _due(self, done: int) -> int:
        """Return how many measurements are to come, that behind step `done` among them."""
        return sum(each >= done for each in self.measurements.after)

    def _is_believed(self) -> bool:
        return len(self._steps) >= min(_FIRST, len(self.tokens))

    def _rate(self) -> float:
        """Seconds a token, by the latest steps."""
        recent = (self._steps[1:] or self._steps)[-20:]  # a session's first step compiles and warms up
        return sum(seconds for _, seconds in recent) / max(1, sum(tokens for tokens, _ in recent))

    def _pause(self) -> float:
        """Seconds that a measurement takes: those of the latest one, or before it those of training as many tokens.

        The latter is an upper bound: a measurement has no backward pass.
        """
        if self._measured is not None and self.measurements.after:
            return self._measured
        return self._rate() * self.measurements.tokens if self._is_believed() else 0.0


class AnswerPace:
    """The clock of the answers' minutes, over all runs of the engine. `since`: when this session began to answer."""

    def __init__(self, minutes: float, clock: Clock, *, since: float | None = None) -> None:
        self.minutes, self.clock = minutes, clock
        self._since, self._spent = clock() if since is None else since, 0.0

    def elapsed(self) -> float:
        """Seconds since answering began, loading the model and earlier sessions among them."""
        return self.clock() - self._since + self._spent

    def resume(self, spent: float) -> None:
        """Earlier sessions had taken `spent` seconds by the time of an answer. The latest such time counts."""
        self._spent = max(self._spent, spent)

    def left(self) -> float:
        """Seconds in which answers may still end."""
        return self.minutes * 60 * (1 - RESERVE) - self.elapsed()

    def is_kept(self) -> bool:
        """Return whether the minutes are not over yet, with what is kept in reserve."""
        return self.elapsed() <= self.minutes * 60
