"""Sentences that readers stumbled over stay out of what users and developers read."""

from __future__ import annotations

import re

import pytest

from tests.helpers.parts import ROOT

#: What stood there, and what to write in its place.
STUMBLED = {
    r"\banew\b": "again",
    r"\bso many\b": "this number of",
    r"\bin small\b": "small",
    r"\bnats? a\b": "nats per token",
    r"worth nothing": "useless",
    r"a bar was missed": "a check failed",
    r"contract: holds": "say what is checked",
    r"overlap one of": "shares words with",
    r"meets? its own": "overlaps with",
    r"at second hand": "as third parties gave it",
    r"nearly repeat": "near-duplicate",
    r"came about": "was made",
    r"compares with nothing": "cannot be compared",
    r"(was|were) wanted\b": "the aim was",
    r"for they are not": "since these are not",
    r"\b(fell|falls?|fallen) for\b": "was left out by",
    r"\b(has|have) evidence\b": "was measured",
}
FILES = [
    ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.yaml"),
    *(ROOT / "fast_ft").rglob("*.py"), *(ROOT / "fast_ft" / "report" / "static").glob("[a-t]*.js"),
]  # fmt: skip


@pytest.mark.parametrize("pattern", STUMBLED)
def test_no_sentence_that_readers_stumbled_over_is_back(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write it another way, such as {STUMBLED[pattern]!r}: {found}"
