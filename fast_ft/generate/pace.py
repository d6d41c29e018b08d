"""A budget of minutes, kept while one run of the engine makes answers: those that would not end in time are cut.

An answer is cut at a look, at the length that it has by then, and nothing else changes a limit. So the clock moves no
decision before a cut, and a replay, which knows the lengths of former answers only, decides as the run before did.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Protocol, TypeVar

from fast_ft.common.console import note
from fast_ft.common.minutes import AnswerPace
from fast_ft.common.wording import counted
from fast_ft.generate.engine.sequence import Sequence

AnyMade = TypeVar("AnyMade", bound="Made")
_WARM = 2  #: looks that tell no speed: the first prefill, and the first steps, which compile and warm up
_TOKENS = 64  #: new tokens of a run before its speed is believed


class Made(Protocol):
    """An answer that was made, as generate.answers.Answer is."""

    @property
    def tokens(self) -> int:
        """Its new tokens."""

    @property
    def within(self) -> float | None:
        """The minutes of the budget that cut it short; None: no budget did."""


def cut_short(answers: Iterable[AnyMade]) -> list[AnyMade]:
    """Return the answers that a budget of minutes cut short."""
    return [answer for answer in answers if answer.within is not None]


class Cuts:
    """Keeps one run of the engine within the minutes of `pace`: the run's own speed, and how long its answers are.

    `made` are the answers that are there already; an answer has at most `most` new tokens.
    """

    def __init__(
        self, pace: AnswerPace, sequences: Iterable[Sequence], made: Collection[Made], most: int,
        end_ids: Collection[int],
    ) -> None:  # fmt: skip
        self.pace, self.most, self.end_ids = pace, most, end_ids
        self.ended = Counter(answer.tokens for answer in made if answer.within is None)  # answers by their lengths
        self.cut = Counter(answer.tokens for answer in cut_short(made))
        self._waiting = sum(row.known is None for row in sequences)  # answers to make that have no token yet
        self._open: dict[Sequence, int] = {}  # begun and not over: tokens at the last look
        self._last, self._looks = pace.clock(), 0  # when that was; how many looks saw what was computed
        self._tokens, self._seconds = 0, 0.0  # of this run, since look number _WARM

    def look(self, live: list[Sequence]) -> None:
        """Take up what the live sequences have become, and cut those that have what all may have."""
        self._measure(live)
        limit = self.limit()
        for row in live:
            if row.known is None and row in self._open and len(row.tokens) >= limit:
                if not self.cut:
                    note(
                        f"warning: answers of up to {self.most} new tokens will not end within "
                        f"budget.generate_minutes={self.pace.minutes:g}: answers are cut, the first one at "
                        f"{counted(len(row.tokens), 'new token')}"
                    )
                row.limit = len(row.tokens)
                self.cut[row.limit] += 1
                del self._open[row]

    def limit(self) -> int:
        """Return how many new tokens an answer may have, so that all end in time: 1 to `most`."""
        left = self.pace.left()
        if left > 0 and (self._tokens < _TOKENS or self._seconds <= 0):
            return self.most
        room = left * self._tokens / self._seconds if left > 0 else 0.0
        made = [tokens for row, tokens in self._open.items() if row.known is None]
        longer = shares_longer(self.ended, self.cut + Counter(made), self.most)
        below = [0.0, *accumulate(longer)]  # tokens that an answer is expected to have, by its limit

        def needed(limit: int) -> float:
            """Return the tokens that are expected to be made yet, under this limit."""
            begun = sum((below[limit] - below[tokens]) / longer[tokens] for tokens in made if tokens < limit)
            return self._waiting * below[limit] + begun

        return max(1, bisect_right(range(self.most + 1), room, key=needed) - 1)

    def _measure(self, live: list[Sequence]) -> None:
        """Note what was made since the last look, and what is over."""
        now = self.pace.clock()
        for row in live:
            if row not in self._open:
                self._open[row] = 0
                self._waiting -= row.known is None
        computed = any(row.known is None for row in live)
        self._looks += computed
        if computed and self._looks > _WARM:
            self._tokens += sum(len(row.tokens) - tokens for row, tokens in self._open.items())
            self._seconds += now - self._last
        self._last = now
        over = {row for row in self._open if self._is_over(row)}
        self._open = {row: len(row.tokens) for row in self._open if row not in over}
        self.ended.update(len(row.tokens) for row in over if row.known is None)

    def _is_over(self, row: Sequence) -> bool:
        return len(row.tokens) >= row.end or (row.known is None and row.tokens[-1] in self.end_ids)


def shares_longer(ended: Counter[int], unfinished: Counter[int], most: int) -> list[float]:
    """Return for each length below `most` the share of answers that become longer (Kaplan and Meier, 1958).

    `ended` are the lengths of answers that have ended, `unfinished` those of answers that would have become longer, or
    may yet. Short answers end first, so the mean of those that have ended would be too low. Beyond the longest one
    nothing is known, and all that are longer are taken to reach `most`.
    """
    share, shares, as_long = 1.0, [], ended.total() + unfinished.total()
    for length in range(most):
        if ended[length]:
            share *= 1 - ended[length] / as_long
        as_long -= ended[length] + unfinished[length]
        shares.append(share)
    return shares


def told(pace: AnswerPace | None, answers: Collection[Made], title: str) -> list[str]:
    """Say what the minutes cut, now that all answers are made, and return it: one sentence, or none."""
    lengths = [answer.tokens for answer in cut_short(answers)]
    if pace is None or not lengths:
        return []
    low, high = min(lengths), max(lengths)
    at = f"{low:,} to {high:,} new tokens" if low < high else counted(low, "new token")
    fits = f"generate.max_new_tokens={low}, or more minutes" if pace.is_kept() else "more minutes"
    said = (
        f"{len(lengths):,} of {len(answers):,} {title} were cut, at {at}: they would not have ended within "
        f"budget.generate_minutes={pace.minutes:g}. What would fit: {fits}"
    )
    note(f"warning: {said}")
    return [said]
