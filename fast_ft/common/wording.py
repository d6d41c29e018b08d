"""Counts in messages: "1 row", "2 rows", "1,000 rows". Nothing else in the program writes an s behind a count."""

from __future__ import annotations


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun. plural: of a noun that takes more than an s, such as entry, entries."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Return a duration with its unit: "9 seconds", "1 minute", "12.5 minutes"."""
    if seconds < 59.5:
        return counted(round(seconds), "second") if seconds >= 0.5 else "less than a second"
    minutes = round(seconds / 60, 1)
    return "1 minute" if minutes == 1 else f"{minutes:g} minutes"


def minutes_between(low: float, high: float) -> str:
    """Return a projection's two ends, in minutes: "5 to 9", "about 5", or "less than 0.1"; never "0 to 0"."""
    low, high = round(low, 1), round(high, 1)
    if high < 0.1:
        return "less than 0.1"
    if low == high:
        return f"about {high:g}"
    return f"{low:g} to {high:g}" if low >= 0.1 else f"at most {high:g}"


def listed(words: list[str], most: int = 3) -> str:
    """Return the first `most` words, joined by commas, and how many more there are: "a, b, c and 4 more"."""
    left = len(words) - most
    return ", ".join(words[:most]) + (f" and {left:,} more" if left > 0 else "")
