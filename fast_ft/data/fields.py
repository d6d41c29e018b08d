"""The fields of one row, by name: which are used, and which hold text of which nothing is read."""

from __future__ import annotations

from typing import Any, NoReturn

from fast_ft.data import turns
from fast_ft.data.examples import Message


class Fields:
    """A row's fields by name. Whatever is asked for is used; what else holds text is `unused` in the end."""

    def __init__(self, row: dict[str, Any], name: str, number: int) -> None:
        self.row = {key: value for key, value in row.items() if value is not None}  # Arrow fills absent keys with None
        self.name, self.number = name, number
        self._asked: set[str] = set()
        self._inside: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value, or the default where the row has none."""
        self._asked.add(key)
        return self.row.get(key, default)

    def text(self, key: str) -> str:
        """Return a field's text, "" where the row has none."""
        return turns.text_of(self.get(key, ""), self.name, self.number, key)

    def conversation(self, key: str) -> list[Message]:
        """Return the turns in a field."""
        messages, unused = turns.conversation(self.get(key), self.name, self.number, key)
        self._inside |= unused
        return messages

    def first(self, keys: tuple[str, ...]) -> str | None:
        """Return the first of the keys that the row has."""
        return next((key for key in keys if key in self.row), None)

    def fail(self, field: str, problem: str, remedy: str) -> NoReturn:
        """Raise the InputError for one of the row's fields."""
        turns.fail(self.name, self.number, field, problem, remedy)

    def unused(self) -> frozenset[str]:
        """Return the names of the fields that hold text and were not asked for."""
        return frozenset(
            self._inside | {k for k, v in self.row.items() if k not in self._asked and turns.holds_text(v)}
        )
