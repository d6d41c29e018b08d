"""Budgets of minutes: how many steps, and how many tokens, still fit at the speed that this run shows.

Training that will not make it anneals its learning rate to nothing over the last steps that fit, and ends there.
Answers that will not make it are cut at the length that lets all of them end. Clocks are passed in, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Clock = Callable[[], float]

ANNEAL = 0.2  #: share of all steps over which a learning rate that has to end early goes down
RESERVE = 0.02  #: share of the minutes kept for saving what was trained
_FIRST = 3  #: training steps before their speed is believed
_TOKENS = 64  #: new tokens before their speed is believed


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
    """The answers' minutes. `spent`: seconds of earlier sessions."""

    def __init__(self, minutes: float, clock: Clock, *, since: float | None = None) -> None:
        self.minutes, self.clock = minutes, clock
        self.began = clock() if since is None else since
        self.cut_at: int | None = None  #: new tokens; None: no answer was cut
        self._first: tuple[int, float] | None = None

    def elapsed(self) -> float:
        """Seconds since answering began, loading the model and earlier sessions among them."""
        return self.clock() - self.began

    def resume(self, spent: float) -> None:
        """Count the seconds of earlier sessions."""
        self.began -= spent

    def left(self) -> float:
        """Seconds in which answers may still end."""
        return self.minutes * 60 * (1 - RESERVE) - self.elapsed()

    def limit(self, made: Sequence[int], finished: Sequence[int], total: int, most: int) -> int:
        """Return how many new tokens an answer may have, so that all end in time; at most `most`.

        `made`: tokens so far of each answer that has not ended; `finished`: lengths of those that have; `total`: new
        tokens of this session. While answers as long as those finished would fit, nothing is cut.
        """
        now, left = self.clock(), self.left()
        self._first = self._first or (total, now)
        since, tokens = now - self._first[1], total - self._first[0]
        if left > 0 and (tokens < _TOKENS or since <= 0):
            return most
        room = max(0.0, left) * tokens / since if since > 0 else 0.0
        usual = sum(finished) / len(finished) if finished else most
        if sum(max(1.0, usual - each) for each in made) <= room:
            return most
        low, high = 0, most  # the longest limit under which even answers that all reach it fit
        while low < high:
            middle = (low + high + 1) // 2
            if sum(max(0, middle - each) for each in made) <= room:
                low = middle
            else:
                high = middle - 1
        return max(1, low)

    def forecast(self, cut: int, most: int) -> str:
        """Return what to say when answers begin to be cut."""
        return (
            f"answers of up to {most} new tokens will not end within budget.generate_minutes={self.minutes:g}: "
            f"from now on they end at about {cut}. What would fit: generate.max_new_tokens={cut}, or more minutes"
        )
