"""Counts in messages: "1 row", "2 rows", "1,000 rows". Nothing else in the program writes an s behind a count."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun. plural: of a noun that takes more than an s, such as entry, entries."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(words: list[str], most: int = 3) -> str:
    """Return the first `most` words, joined by commas, and how many more there are: "a, b, c and 4 more"."""
    left = len(words) - most
    return ", ".join(words[:most]) + (f" and {left:,} more" if left > 0 else "")
