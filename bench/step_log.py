"""The lines of a training's steps, and when the first of the steps that are timed begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fast_ft.train.session import TrainSession


class StepLog:
    """What a session says of its steps: `lines`. The first `warm_up` of them end before the next one is launched.

    A session runs ahead of its lines. Where the host is slower than the card, a step's end is known only when the next
    one is launched; the last step's is known at once. Counted from such a line on, a step too few would be timed.
    """

    def __init__(self, warm_up: int) -> None:
        self.lines: list[dict[str, Any]] = []
        self._warm_up = warm_up
        self._session: TrainSession | None = None

    def follow(self, session: TrainSession) -> None:
        """Hold a session that was not yet run to its own lines until it is warm."""
        if session.ahead and self._warm_up:
            self._session, session.ahead = session, False

    def __call__(self, line: dict[str, Any]) -> None:
        """Take a step's line; after the warm-up's last one the session runs ahead."""
        self.lines.append(line)
        if self._session is not None and len(self.lines) == self._warm_up:
            self._session.ahead = True

    @property
    def seconds(self) -> list[float]:
        """The seconds of each step behind the warm-up: together, from the warm-up's end to that of the last step."""
        return [float(line["seconds"]) for line in self.lines[self._warm_up :]]
