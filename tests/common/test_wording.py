"""Counts and projections as messages write them, and that nothing writes them in another way."""

from __future__ import annotations

import re

import pytest

from fast_ft.common.wording import counted, duration, listed, minutes_between
from tests.helpers.parts import ROOT


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((1, "row"), "1 row"), ((0, "row"), "0 rows"), ((2, "row"), "2 rows"), ((1000, "row"), "1,000 rows"),
        ((1, "entry", "entries"), "1 entry"), ((2, "entry", "entries"), "2 entries"),
    ],
)  # fmt: skip
def test_one_is_singular(words: tuple[int, str], text: str) -> None:
    assert counted(*words) == text


def test_a_long_list_says_how_many_more() -> None:
    assert listed(["a", "b"]) == "a, b" and listed(list("abcde")) == "a, b, c and 2 more" and listed([]) == ""


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0, 0.0, "less than 0.1"), (0.01, 0.04, "less than 0.1"), (0.01, 0.1, "at most 0.1"),
        (0.1, 0.1, "about 0.1"), (0.1, 0.3, "0.1 to 0.3"), (5.04, 5.0, "about 5"), (4.0, 9.5, "4 to 9.5"),
    ],
)  # fmt: skip
def test_a_projection_never_goes_from_nothing(low: float, high: float, text: str) -> None:
    assert minutes_between(low, high) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"), (1.2, "1 second"), (59.4, "59 seconds"), (59.6, "1 minute"), (64, "1.1 minutes"),
        (754, "12.6 minutes"),
    ],
)  # fmt: skip
def test_a_duration_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_else_decides_between_singular_and_plural() -> None:
    own = re.compile(r"""(""|''|"s"|'s') if [\w.()]+ == 1|== 1 else ["']s""")
    found = [path for path in (ROOT / "fast_ft").rglob("*.py") if own.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in found] == []
