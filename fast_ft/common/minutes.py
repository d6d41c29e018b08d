"""Budgets of minutes: how many steps still fit at the speed that training shows, and the clock of the answers.

Training that will not make it anneals its learning rate to nothing over the last steps that fit, and ends there.
Answers that will not make it are cut by generate/pace.py. Clocks are passed in, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Clock = Callable[[], float]

ANNEAL = 0.2  #: share of all steps over which a learning rate that has to end early goes down
RESERVE = 0.02  #: share of the minutes kept for saving what was trained
_FIRST = 3  #: training steps before their speed is believed


def longer(now: float | None, then: float | None) -> bool:
    """Return whether the budget `now` allows more minutes than the budget `then`; None is no limit."""
    return then is not None and (now is None or now > then)


class TrainPace:
    """Training's minutes. `tokens` are those of every step of the run; `spent`: seconds of earlier sessions."""

    def __init__(
        self, minutes: float, tokens: Sequence[int], clock: Clock, *, spent: float = 0.0, since: float | None = None
    ) -> None:
        self.minutes, self.tokens, self.clock = minutes, tokens, clock
        self._began = (clock() if since is None else since) - spent
        self._steps: list[tuple[int, float]] = []  # of this session: tokens, seconds
        self._last = clock()

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

    def left(self) -> float:
        """Seconds in which steps may still end."""
        return self.minutes * 60 * (1 - RESERVE) - self.elapsed()

    def seconds(self, first: int, last: int) -> float:
        """Seconds that steps `first` (counted from 0) to `last` (not included) will take, by the latest ones."""
        recent = (self._steps[1:] or self._steps)[-20:]  # a session's first step compiles and warms up
        rate = sum(seconds for _, seconds in recent) / max(1, sum(tokens for tokens, _ in recent))
        return rate * sum(self.tokens[first:last])

    def fitting(self, done: int) -> int | None:
        """Return how many steps still fit after `done`; None while that cannot be told."""
        if len(self._steps) < min(_FIRST, len(self.tokens)):
            return None
        left, last = self.left(), done
        per_token = self.seconds(done, len(self.tokens)) / max(1, sum(self.tokens[done:]))
        while last < len(self.tokens) and (left := left - per_token * self.tokens[last]) >= 0:
            last += 1
        return last - done

    def anneal(self, done: int) -> int | None:
        """Return over how many steps the learning rate has to go down from now on, or None: not yet, or not at all."""
        fitting = self.fitting(done)
        if fitting is None or done + fitting >= len(self.tokens) or fitting > ANNEAL * (done + fitting):
            return None
        return fitting

    def is_ample(self, done: int) -> bool:
        """Return whether the steps after `done` will all end in time, though they took a quarter longer; else False."""
        return self.fitting(done) is not None and 1.25 * self.seconds(done, len(self.tokens)) < self.left()

    def forecast(self, done: int) -> str | None:
        """Return a sentence that says what will happen to a run that does not fit, and what would. None: it fits."""
        fitting, total = self.fitting(done), len(self.tokens)
        if fitting is None or done + fitting >= total:
            return None
        needed = (self.elapsed() + self.seconds(done, total)) / 60 / (1 - RESERVE)
        last = done + max(1, fitting)
        return (
            f"training will take about {needed:.3g} minutes, budget.train_minutes is {self.minutes:g}: it will end "
            f"after about step {last} of {total}, its learning rate brought down early. What would fit: "
            f"train.max_steps={last}, or budget.train_minutes={needed * 1.05:.3g}"
        )


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
