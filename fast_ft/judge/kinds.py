"""The kinds of judge that `judge.kind` names. A new kind is one class like these two, and one line in KINDS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fast_ft.judge import address, reply_cache
from fast_ft.judge.openai_judge import OpenAIJudge
from fast_ft.judge.reference_judge import ReferenceJudge
from fast_ft.judge.scoring import AnswerJudge, Item
from fast_ft.recipe import schema


class JudgeSession(AnswerJudge, Protocol):
    """A judge and what goes on around its calls."""

    concurrency: int  #: calls at a time

    def print_forecast(self, items: Sequence[Item], *, ask_again: bool = False) -> None:
        """Print what judging these items would take. Raises InputError where it would be refused."""

    def asking(
        self, items: Sequence[Item], *, ask_again: bool = False, backoff: float = 1.0
    ) -> AbstractContextManager[None]:
        """Open and close what the calls need. Raises InputError where judging is refused."""

    def stop(self) -> None:
        """Begin nothing new: the command ends."""

    def facts(self) -> dict[str, Any]:
        """Return what scores.json says of the judge and of this command's requests."""

    def totals(self, prompts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what scores.json says of all prompts, beside what every kind of judge has."""


@dataclass(frozen=True)
class JudgeKind:
    """One kind. `make(section, folder, others)` returns a judge.

    It keeps its replies in `folder`, and also knows those in the folders `others`.
    """

    make: Callable[[schema.Judge, Path, Sequence[Path]], JudgeSession]
    check: Callable[[], None]  #: raises InputError for what would stop the judge after hours of training
    is_free: bool  #: it asks no server
    is_share: bool  #: its mean is a share of matches, 0 to 1, and not a score


def _reference(section: schema.Judge, folder: Path, others: Sequence[Path]) -> JudgeSession:
    return ReferenceJudge(section.pattern)


def _openai(section: schema.Judge, folder: Path, others: Sequence[Path]) -> JudgeSession:
    cache = reply_cache.ReplyCache(folder / reply_cache.FILE, [other / reply_cache.FILE for other in others])
    return OpenAIJudge(section, cache, pairwise=section.references is not None)


KINDS = {
    "reference": JudgeKind(_reference, lambda: None, is_free=True, is_share=True),
    "openai": JudgeKind(_openai, address.require_key, is_free=False, is_share=False),
}
