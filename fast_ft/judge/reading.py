"""How a judge's reply is read: the scores that it states, where nothing else can be meant, or why there are none.

A reply begins with its scores: two numbers on a line, `[[8]] [[7]]`, labels ("Answer 1: 8", "Reference: 9 / Answer: 7")
or JSON. They may stand in a ``` fence, and behind a finished `<think>` block. The rest of the reply is reasons. A reply
that states other scores in its reasons has none.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from fast_ft.judge import claims
from fast_ft.judge.claims import Claim, Scores

_MARK = r"[*_`]{0,3}"  # Markdown's emphasis
_N = r"\d+(?:\.\d+)?"
_SCORE = rf"{_MARK}(?:\[\[\s*{_N}\s*\]\]|\[\s*{_N}\s*\]|{_N}(?:\s*/\s*10(?!\d|\.\d))?){_MARK}"
_BETWEEN = r"(?:\s*[,;|&]\s*|\s+(?:and\s+)?|(?<=\])(?=\[))"
_INTRO = rf"{_MARK}(?:the\s+)?(?:final\s+|overall\s+)?(?:scores?|ratings?)(?:\s+(?:are|is))?{_MARK}\s*[:：]{_MARK}"
_FORMS = {
    2: rf"\(?(?P<first>{_SCORE}){_BETWEEN}(?P<second>{_SCORE})\)?",
    1: rf"(?P<second>{_SCORE})",
}
_LINE = {count: re.compile(rf"(?:{_INTRO}\s*)?{form}\.?", re.IGNORECASE) for count, form in _FORMS.items()}
#: Scores in the middle of a reason that claim to be the scores: behind an introduction, or in double brackets.
_AGAIN = {
    2: re.compile(
        rf"{_INTRO}\s*{_FORMS[2]}|(?P<a>\[\[\s*{_N}\s*\]\])\s*[,;|&]?\s*(?:and\s+)?(?P<b>\[\[\s*{_N}\s*\]\])", re.I
    ),
    1: re.compile(rf"{_INTRO}\s*{_FORMS[1]}|(?P<b>\[\[\s*{_N}\s*\]\])", re.IGNORECASE),
}
_TITLE = re.compile(rf"(?:#+\s*)?{_INTRO}", re.IGNORECASE)
_LABELLED = re.compile(rf"{_MARK}(?P<label>[^\W\d_][\w .#'’-]*?)\s*{_MARK}\s*[:：=]\s*{_MARK}\s*(?P<score>{_SCORE})")
_ITEM_END = re.compile(r"\s*[/,;|&]\s*|\s+(?:and\s+)?|\.?$")
_BULLET = re.compile(r"(?:[-*•]|#+)\s+")
_LONGEST = 200  # characters of a line that states scores and nothing else
_MOST_OBJECTS = 200  # JSON objects among a reply's reasons that are looked at
_OPEN = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)
_CLOSE = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_FENCE = re.compile(r"(`{3,}|~{3,})[^\n`]*\n(?P<inner>.*?)(?:\n\s*\1`*[ \t]*(?=\n|$)(?P<rest>.*)|$)", re.DOTALL)


class _Head(NamedTuple):
    """The scores that a reply begins with. `rest`: what stands behind them; `open`: more of the line may have come."""

    claims: list[Claim]
    rest: str
    open: bool = False


def read(reply: str, count: int, *, reference_first: bool = True, cut: bool = False) -> Scores | str:
    """Return the `count` (1 or 2) scores of a reply, or a sentence that says why there are none.

    reference_first: the first of two answers is the reference, so that a label may say "reference". cut: the reply
    ended at its most tokens, so its last number may lack a digit.
    """
    body = _without_thought(reply)
    if body is None:
        return "its reasoning (<think>) does not end, or ends twice"
    text = "\n".join(words for line in body.splitlines() if (words := " ".join(line.split())))
    if not text:
        return "the reply is empty"
    fence = _FENCE.match(text)
    inner, outer = (fence["inner"], fence["rest"] or "") if fence else (text, "")
    closed = (fence is not None and fence["rest"] is not None) or (fence is None and body.endswith("\n"))
    head = _head(inner.strip(), count)
    if head is None:
        said = "a reply that was cut at its most tokens" if cut else "the reply"
        return (
            f"{said} does not begin with {'one score' if count == 1 else 'two scores'} that can be read in one way only"
        )
    if cut and head.open and not head.rest and not closed:
        return "the reply was cut at its most tokens in the middle of its scores"
    found = claims.settle(head.claims, count, reference_first)
    if isinstance(found, str):
        return found
    for others in _stated(f"{head.rest}\n{outer}", count):
        if claims.differ(others, found, reference_first):
            return "the reply states other scores further down"
    return found


def unfinished_thought(text: str) -> bool:
    """Return whether a reply is the beginning of a `<think>` block and nothing else."""
    return _OPEN.match(text.lstrip()) is not None and _CLOSE.search(text) is None


def _without_thought(reply: str) -> str | None:
    """Return a reply without the `<think>` blocks before its answer; None where their end is not clear."""
    text = reply.lstrip()
    if not _OPEN.match(text):
        # Some templates put <think> into the prompt: the reply then holds the end alone.
        opened, end = _OPEN.search(text), _CLOSE.search(text)
        if end is None or (opened is not None and opened.start() < end.start()):
            return reply
        text = text[end.end() :].lstrip()
    while _OPEN.match(text):
        end = _CLOSE.search(text)
        if end is None:
            return None
        text = text[end.end() :].lstrip()
    return None if _CLOSE.search(text) else text


def _head(text: str, count: int) -> _Head | None:
    """Return the scores that a text begins with, in any of the forms, or None."""
    if title := re.match(r"[^\n]*", text):
        line = title.group().strip()
        if _TITLE.fullmatch(line):
            text = text[title.end() :].strip()
    line, _, rest = text.partition("\n")
    if found := _bare(line.strip(), count):
        return _Head(found, rest, open=not line.rstrip().endswith("]"))
    if text.startswith(("{", "[")):
        return _json_head(text)
    return _labels_head(text)


def _bare(line: str, count: int) -> list[Claim]:
    match = _LINE[count].fullmatch(line) if len(line) <= _LONGEST else None
    if match is None:
        return []
    return [Claim(place, claims.number(match[place])) for place in ("first", "second") if place in match.groupdict()]


def _json_head(text: str) -> _Head | None:
    parsed = _decoded(text, 0)
    if parsed is None:
        return None
    value, end = parsed
    line, _, rest = text[end:].partition("\n")
    found = claims.of_json(value)
    return _Head(found, rest) if found and line.strip() in ("", ".") else None


def _decoded(text: str, place: int) -> tuple[object, int] | None:
    try:
        decoder = json.JSONDecoder(object_pairs_hook=claims.unique, parse_constant=claims.no_number)
        return decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None


def _labels_head(text: str) -> _Head | None:
    """Return the labelled scores of the lines that a text begins with."""
    found: list[Claim] = []
    lines = text.split("\n")
    while lines:
        items = _labelled(lines[0])
        if not items:
            break
        found += items
        lines.pop(0)
    return _Head(found, "\n".join(lines), open=True) if found else None


def _labelled(line: str) -> list[Claim]:
    """Return the labelled scores of a line that holds nothing else, or []."""
    if len(line := line.strip()) > _LONGEST:
        return []
    if bullet := _BULLET.match(line):
        line = line[bullet.end() :]
    found, place = [], 0
    while place < len(line):
        item = _LABELLED.match(line, place)
        label = claims.place_of(item["label"]) if item else None
        end = _ITEM_END.match(line, item.end()) if item else None
        if item is None or label is None or end is None:
            return []
        found.append(Claim(label, claims.number(item["score"])))
        place = end.end()
    return found


def _stated(rest: str, count: int) -> Iterator[list[Claim]]:
    """Yield the scores that reasons state: whole lines, JSON, and what is introduced as the scores."""
    for line in rest.split("\n"):
        yield _bare(line.strip(), count) or _labelled(line)
        if line.startswith("[") and (parsed := _decoded(line, 0)):
            yield claims.of_json(parsed[0])
    for match in _AGAIN[count].finditer(rest):
        given = match.groupdict()
        values = {"first": given.get("first") or given.get("a"), "second": given.get("second") or given.get("b")}
        yield [Claim(place, claims.number(value)) for place, value in values.items() if value]
    for brace in itertools.islice(re.finditer(r"\{", rest), _MOST_OBJECTS):
        if parsed := _decoded(rest, brace.start()):
            yield claims.of_json(parsed[0])
