"""A conversation as text by a chat template, cut into the template's own text and the turns' texts.

A template is a stranger's program, so nothing about it is believed. It is rendered a second time with private-use
characters in the place of the turns' texts. That tells where each text stands. Put together again, the pieces must be
the text that the template gave at first: then every turn is there once, whole, and in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from fast_ft.common.errors import InputError
from fast_ft.data.examples import Message
from fast_ft.data.prompt_templates import turn_name

#: Tags at which templates of reasoning models cut an answer; the texts on both sides are looked for by themselves.
_TAGS = re.compile(r"(\s*</?think>\s*)")
_FIRST_MARK = 0xF0000
#: Fields that say whose turn it is; a template that leaves them out loses no text of the conversation.
_SOFT = ("name", "tool_call_id")
_REMEDY = "Take it out, or use another model.template."


class Renderer(Protocol):
    """What turns a conversation into text."""

    def render(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, add_generation_prompt: bool) -> str:
        """Return the text. Raises InputError where the conversation is refused."""


@dataclass(frozen=True)
class Rendering:
    """A text in pieces: gaps[0], texts[0], gaps[1], ..., gaps[-1]. The gaps are the template's own.

    turns: of which turn each text is, or is a part. remarks: what a user should know.
    """

    gaps: list[str]
    texts: list[str]
    turns: list[int]
    remarks: list[str]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for pair in zip(self.gaps, [*self.texts, ""], strict=True) for piece in pair)

    def gap_at(self, number: int) -> int:
        """Return at which character of the text a gap begins."""
        return sum(map(len, self.gaps[:number])) + sum(map(len, self.texts[:number]))

    def texts_of(self, turn: int) -> list[int]:
        """Return the numbers of a turn's texts."""
        return [number for number, each in enumerate(self.turns) if each == turn]


def render(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], *, add_generation_prompt: bool
) -> Rendering:
    """Return the rendered conversation. Raises InputError, beginning with the turn, where a text is lost or changed."""
    remarks = _check_more(renderer, messages, tools)
    marks, pieces = map(chr, count(_FIRST_MARK)), []
    turns = []
    for index, message in enumerate(messages):
        content = ""
        for place, piece in enumerate(_TAGS.split(message.content)):
            if piece and place % 2 == 0:
                mark = next(marks)
                pieces.append((mark, piece, index))
                piece = mark
            content += piece
        turns.append({**message.turn, "content": content})
    skeleton = renderer.render(turns, tools, add_generation_prompt=add_generation_prompt)
    real = renderer.render([each.turn for each in messages], tools, add_generation_prompt=add_generation_prompt)
    found = _in_order(skeleton, pieces, messages, remarks)
    gaps = re.split("|".join(mark for mark, _, _ in found), skeleton) if found else [skeleton]
    texts: list[str] = []
    at = len(gaps[0])
    for gap, (_, text, turn) in zip(gaps[1:], found, strict=True):
        ways = (text, json.dumps(text, ensure_ascii=False)[1:-1])  # as it is, or by the filter `tojson`
        written = next((way for way in ways if real.startswith(way + gap, at)), None)
        if written is None:
            raise InputError(f"{turn_name(messages, turn)}: the chat template changes its text. {_REMEDY}")
        texts.append(written)
        at += len(written + gap)
    if not real.startswith(gaps[0]) or at != len(real):
        raise InputError(f"the chat template writes something else around these turns' texts. {_REMEDY}")
    return Rendering(gaps, texts, [turn for _, _, turn in found], remarks)


def _in_order(
    skeleton: str, pieces: list[tuple[str, str, int]], messages: Sequence[Message], remarks: list[str]
) -> list[tuple[str, str, int]]:
    """Return the pieces as they stand in the text. Only a system turn at the front may come later, which is told."""
    for mark, _, turn in pieces:
        if (times := skeleton.count(mark)) != 1:
            said = "leaves this turn, or a part of it, out" if times == 0 else f"writes this turn {times} times"
            raise InputError(f"{turn_name(messages, turn)}: the chat template {said}. {_REMEDY}")
    found = sorted(pieces, key=lambda piece: skeleton.index(piece[0]))
    if found != pieces:
        front = 0 if messages[0].role == "system" else None
        rest = [piece for piece in pieces if piece[2] != front]
        others = [piece for piece in found if piece[2] != front]
        if others != rest:
            moved = next(piece for piece, due in zip(others, rest, strict=True) if piece != due)
            raise InputError(f"{turn_name(messages, moved[2])}: the chat template moves this turn. {_REMEDY}")
        remarks.append("the chat template puts the system turn into a later turn")
    return found


def _check_more(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any]) -> list[str]:
    """Return remarks on what is left out. Raises InputError where a call, a reasoning or a tool is not in the text."""
    if not tools and not any(message.more for message in messages):
        return []
    marks = map(chr, count(_FIRST_MARK))
    looked_for: list[tuple[str, int | None, str]] = []
    turns = []
    for index, message in enumerate(messages):
        more = {}
        for field, value in message.more.items():
            more[field], used = _with_marks(value, marks)
            looked_for += [(mark, index, field) for mark in used]
        turns.append({**message.turn, **more})
    functions = []
    for tool in tools:
        inner = tool.get("function")
        named, used = _with_marks({"name": (inner or tool).get("name", "")}, marks)
        functions.append({**tool, "function": {**inner, **named}} if inner else {**tool, **named})
        looked_for += [(mark, None, "tools") for mark in used]
    text = renderer.render(turns, functions, add_generation_prompt=False)
    lost = {(turn, field) for mark, turn, field in looked_for if mark not in text}
    for turn, field in sorted(lost, key=str):
        if field not in _SOFT:
            where = field if turn is None else f"{turn_name(messages, turn)}, {field}"
            raise InputError(f"{where}: the chat template leaves it out. {_REMEDY}")
    return [f"the chat template leaves out the turns' {field}" for field in sorted({field for _, field in lost})]


def _with_marks(value: Any, marks: Iterator[str]) -> tuple[Any, list[str]]:
    """Return a field's value with a mark in the place of each text, and the marks; ids and types stay."""
    if isinstance(value, str):
        mark = next(marks)
        return mark, [mark]
    if isinstance(value, list | tuple):
        made = [_with_marks(each, marks) for each in value]
        return [each for each, _ in made], [mark for _, used in made for mark in used]
    if isinstance(value, Mapping):
        inner = {key: (each, []) if key in ("id", "type") else _with_marks(each, marks) for key, each in value.items()}
        return {key: each for key, (each, _) in inner.items()}, [mark for _, used in inner.values() for mark in used]
    return value, []
