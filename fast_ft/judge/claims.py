"""What a judge's reply claims: a number for a place, and which two places make a pair of scores.

A place is "first" or "second" (of the two answers in the order of the question), "reference" or "answer" (by their
part), or "score" (a label that names no answer).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple, NoReturn

_FILLING = {"score", "scores", "rating", "ratings", "grade", "of", "for", "the", "overall", "final", "s"}
_THING = r"(?:answer|assistant|response|model)"
_PLACES = {
    "score": re.compile(""),
    "first": re.compile(rf"{_THING}?(?:1|a|one)|(?:1st|first){_THING}?"),
    "second": re.compile(rf"{_THING}?(?:2|b|two)|(?:2nd|second){_THING}?"),
    "reference": re.compile(rf"ref|reference{_THING}?"),
    "answer": re.compile(rf"answer|response|candidate{_THING}?|modelanswer|modelresponse"),
}


class Scores(NamedTuple):
    """Two scores in the order of the question asked, 1 to 10; `first` is None under the single rubric."""

    first: float | None
    second: float


class Claim(NamedTuple):
    """A reply's score for a place. `value` is None for what is no number, such as a second score of the same name."""

    place: str
    value: float | None


def place_of(label: str) -> str | None:
    """Return the place that a label names, or None of a label that names none."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label)
    words = [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word and word not in _FILLING]
    return next((place for place, form in _PLACES.items() if form.fullmatch("".join(words))), None)


def number(text: str) -> float | None:
    """Return the score in a piece of a reply, such as 8, 8.5, [[8]], **8** or 8/10, or None."""
    found = re.fullmatch(r"[\s*_`\[]*(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s*_`\]]*", text)
    return float(found[1]) if found else None


def settle(found: Collection[Claim], count: int, reference_first: bool) -> Scores | str:
    """Return the scores that claims make together, or a sentence that says why they make none."""
    values: dict[str, float] = {}
    pair: tuple[float | None, float]
    for place, value in found:
        if value is None or values.get(place, value) != value:
            return "it names the same answer twice, with different scores, or a score that is no number"
        values[place] = value
    if count == 1:
        if len(values) != 1 or not values.keys() <= {"score", "answer", "second"}:
            return "it does not state one score"
        pair = (None, next(iter(values.values())))
    elif values.keys() == {"first", "second"}:
        pair = (values["first"], values["second"])
    elif values.keys() == {"reference", "answer"}:
        if not reference_first:
            return "it tells a reference from an answer, which this question did not name"
        pair = (values["reference"], values["answer"])
    else:
        return "it does not state one score for each of the two answers"
    for value in pair:
        if value is not None and not 1 <= value <= 10:
            return f"{value:g} is no score from 1 to 10"
    return Scores(*pair)


def differ(others: Collection[Claim], scores: Scores, reference_first: bool) -> bool:
    """Return whether other claims of a reply say anything else than its scores."""
    values = {"first": scores.first, "second": scores.second}
    if scores.first is None:
        values = dict.fromkeys(("score", "answer", "second"), scores.second)
    elif reference_first:
        values |= {"reference": scores.first, "answer": scores.second}
    return any(place in values and value != values[place] for place, value in others)


def of_json(value: object) -> list[Claim]:
    """Return the claims of a JSON value: an object with labels as its keys, or a list of two numbers."""
    if isinstance(value, list):
        while len(value) == 1 and isinstance(value[0], list):
            value = value[0]
        numbers = [_json_number(each) for each in value]
        return [Claim("first", numbers[0]), Claim("second", numbers[1])] if len(numbers) == 2 else []
    if not isinstance(value, dict):
        return []
    found: list[Claim] = []
    for key, inner in value.items():
        place = place_of(key)
        if place is None:
            continue
        if place == "score" and isinstance(inner, dict | list):
            found += of_json(inner)
        elif isinstance(inner, dict):
            own = [claim.value for claim in of_json(inner) if claim.place == "score"]
            found.append(Claim(place, own[0] if len(own) == 1 else None))
        else:
            found.append(Claim(place, _json_number(inner)))
    return found


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs; ValueError where a key stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def no_number(name: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity, which JSON does not have."""
    raise ValueError(name)


def _json_number(value: object) -> float | None:
    if isinstance(value, str):
        return number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # of a whole number with hundreds of digits
        return None
