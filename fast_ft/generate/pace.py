"""A budget of minutes, kept while answers are made: those that would not end in time are shortened."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fast_ft.common.console import note
from fast_ft.common.minutes import AnswerPace
from fast_ft.generate.engine.sequence import Sequence


def shortening(
    pace: AnswerPace, sequences: list[Sequence], most: int, end_ids: Collection[int], notes: list[str]
) -> Callable[[list[Sequence]], None]:
    """Return what looks at the sequences now and then, and shortens those that would not end in time."""

    def look(live: list[Sequence]) -> None:
        fresh = [row for row in sequences if row.known is None]
        open_ = [row for row in fresh if not ended(row)]
        finished = [row.known or len(row.tokens) for row in sequences if row.known is not None or ended(row)]
        total = sum(len(row.tokens) for row in fresh)
        limit = pace.limit([len(row.tokens) for row in open_], finished, total, most)
        if limit < most and pace.cut_at is None:
            notes.append(pace.forecast(limit, most))
            note(f"warning: {notes[-1]}")
        if limit < most:
            pace.cut_at = limit
        for row in open_:
            row.limit = min(most, max(len(row.tokens), limit))

    def ended(row: Sequence) -> bool:
        return bool(row.tokens) and (len(row.tokens) >= row.limit or row.tokens[-1] in end_ids)

    return look
