"""Reference answers for judging, found by a prompt's id or by its text."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fast_ft.common.errors import InputError
from fast_ft.data.formats import strip_lead

#: A prompt's turns as (role, text), which are compared: without Alpaca's lead sentence, each run of spaces one space.
Question = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class References:
    """by_id: {row's id: its answer}. questions: {row's id: what the answer answers, None where that is not there}."""

    by_id: Mapping[str, str]
    questions: Mapping[str, Question | None]
    source: str

    @cached_property
    def _by_question(self) -> dict[Question, list[str]]:
        """The ids of the rows with each question."""
        found: dict[Question, list[str]] = {}
        for id_, asked in self.questions.items():
            if asked is not None:
                found.setdefault(asked, []).append(id_)
        return found

    def find(self, prompt_id: str, messages: object) -> str | None:
        """Return the reference answer to a prompt, or None where there is none.

        The row with the prompt's id is taken where it asks the same, or where the file does not say what it asks; else
        the row that asks the same. Raises InputError where that row answers another question, and where rows that ask
        the same give different answers.
        """
        asked = question(messages)
        if prompt_id in self.by_id and self.questions.get(prompt_id) in (None, asked):
            return self.by_id[prompt_id]
        ids = self._by_question.get(asked, []) if asked is not None else []
        answers = {self.by_id[id_] for id_ in ids}
        if len(answers) > 1:
            raise InputError(
                f"judge.references: {self.source} has different answers to the text of prompt {prompt_id!r}, in the "
                f"rows {ids[0]!r} and {next(i for i in ids if self.by_id[i] != self.by_id[ids[0]])!r}. Give the right "
                "row the prompt's id, or leave the others out."
            )
        if answers:
            return answers.pop()
        if prompt_id in self.by_id:
            raise InputError(
                f"judge.references: {self.source} has another question under the id {prompt_id!r} than the prompts "
                "have, and no row with the prompt's text. References are matched by id and text: give each row the "
                "prompt's id and the prompt itself."
            )
        return None


def question(messages: object) -> Question | None:
    """Return messages in the form in which questions are compared, or None where there are none."""
    if not isinstance(messages, list | tuple) or not messages:
        return None
    turns = []
    for message in messages:
        role, text = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        turns.append((role, " ".join(unicodedata.normalize("NFC", strip_lead(text)).split())))
    return tuple(turns)
