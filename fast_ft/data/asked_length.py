"""The number of words that a prompt asks for, and how far a response misses it."""

from __future__ import annotations

import re

from fast_ft.common.words import words

#: What a row must hold to be looked at; a pattern of RE2's, for Arrow.
MENTIONS = r"(?i)\d[\s-]*words?\b"
_LESS = (
    r"at most|no more than|not more than|up to|less than|fewer than|under|within|maximum(?: of)?|below|"
    r"not exceed(?:ing)?"
)
_MORE = r"at least|no less than|not less than|more than|over|minimum(?: of)?|minimum length of"
_ASKED = re.compile(
    rf"(?:(?P<less>\b(?:{_LESS})\s|<)\s*|(?P<more>\b(?:{_MORE})\s|>)\s*)?(?<![\d.,])(?P<low>\d{{1,5}})"
    r"(?:\s*(?:-|\u2013|\u2014|to|and|or)\s*(?P<high>\d{1,5}))?[\s-]*words?\b(?P<after>[^.,;:!?]{0,20})",
    re.IGNORECASE,
)
_IN_PARTS = re.compile(
    r"\b(?P<parts>\d{1,2}) (?:\w+ )?(?:of|with)(?: \w+){0,2} (?P<words>\d{1,5})[ -]words?(?: \w+)? (?:each|per)\b",
    re.IGNORECASE,
)
_LEAST_WORDS = 10  #: "a 3 word phrase" asks for a phrase within the answer, not for the answer's length
_OF_A_PART = re.compile(r"\b(each|per|apiece|long sentences?)\b", re.IGNORECASE)


def asked_words(prompt: str) -> tuple[float, float] | None:
    """Return the least and the most words that a prompt asks for, or None where it asks for no number of words.

    "a 300-400 word essay" is (300, 400), "about 200 words" (200, 200), "at least 150 words" (150, inf), "3 paragraphs
    of 200 words each" (600, 600). The length of each of uncounted parts is not the answer's, nor is a number below 10.
    """
    if parts := _IN_PARTS.search(prompt):
        return (float(int(parts["parts"]) * int(parts["words"])),) * 2
    for found in _ASKED.finditer(prompt):
        low, high = int(found["low"]), int(found["high"] or found["low"])
        if high < max(low, _LEAST_WORDS) or _OF_A_PART.search(found["after"]):
            continue
        if found["less"] or re.match(r"\s*(or less|or fewer|at most|max)", found["after"], re.IGNORECASE):
            return 0.0, float(high)
        if found["more"] or re.match(r"\s*(or more|at least|min)", found["after"], re.IGNORECASE):
            return float(low), float("inf")
        return float(low), float(high)
    return None


def missed(prompt: str, response: str) -> float:
    """Return by what share of it a response misses the length that its prompt asks for; 0.0 where it asks for none."""
    if (asked := asked_words(prompt)) is None:
        return 0.0
    (low, high), count = asked, len(words(response))
    if count < low:
        return (low - count) / low
    return (count - high) / high if count > high else 0.0
