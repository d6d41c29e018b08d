"""Turns of a conversation: a list of role and content, or of from and value, becomes Messages.

The keys `weight`, `train`, `training` and `loss` say whether an assistant turn is trained. What a chat template may
render beside the text (MORE) goes along; any other field that is filled is named as unused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from fast_ft.common.errors import InputError
from fast_ft.data.examples import Message

CONVERSATIONS = ("conversations", "messages")
TURN_KEYS = (("role", "content"), ("from", "value"))
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
#: LLaMA-Factory's role of an assistant turn whose text is the JSON of a call.
CALL_ROLE = "function_call"
#: Which role may follow which; a system turn may stand anywhere.
FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
LOSS_KEYS = ("weight", "train", "training", "loss")
MORE = (
    "name", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
#: Fields whose loss per part of a turn, or whose pictures, are not supported: refused where they are filled.
NOT_READ = ("train_detail", "images", "image", "audio", "video")


def fail(name: str, number: int, field: str, problem: str, remedy: str) -> NoReturn:
    """Raise the InputError for a field of row `number` (from 1)."""
    raise InputError(f"{name}, row {number}, {field}: {problem}. {remedy}")


def text_of(value: Any, name: str, number: int, field: str) -> str:
    """Return a field's text without outer whitespace. Raises InputError where it is no text."""
    if not isinstance(value, str):
        fail(name, number, field, f"{str(value)[:40]!r} is not text ({type(value).__name__})", "Give a string.")
    return value.strip()


def holds_text(value: object) -> bool:
    """Return whether a field's value is text, or has text somewhere inside, that is not blank."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_text, value))


def conversation(value: Any, name: str, number: int, key: str) -> tuple[list[Message], set[str]]:
    """Return the turns of the row's field `key`, and the names of filled fields inside that are not used.

    Turns go user, assistant, user, ...; an assistant turn may be followed by tool turns. An empty system turn is none.
    Raises InputError.
    """
    if not isinstance(value, list) or not value:
        fail(name, number, key, f"{str(value)[:40]!r} is no list of turns", "Give [{role, content}, ...].")
    messages: list[Message] = []
    unused: set[str] = set()
    before = ""
    for position, turn in enumerate(value):
        message, said_by, left = _message(turn, name, number, f"{key}[{position}]")
        unused |= {f"{key}[].{field}" for field in left}
        if message.role == "system":
            messages += [message] if message.content else []
            continue
        if message.role not in FOLLOWS[before]:
            fail(
                name, number, f"{key}[{position}].{said_by}", f"{message.role} out of turn",
                "Turns go user, assistant, user, ...; a tool's follows an assistant's. System turns stand anywhere.",
            )  # fmt: skip
        before = message.role
        messages.append(message)
    return messages, unused


def _message(turn: Any, name: str, number: int, field: str) -> tuple[Message, str, set[str]]:
    """Return a turn, the key that says who speaks, and the filled fields that are not used."""
    found = [pair for pair in TURN_KEYS if isinstance(turn, dict) and turn.get(pair[0]) is not None]
    if not found:
        fail(name, number, field, f"{str(turn)[:40]!r} is no turn", "A turn has role and content, or from and value.")
    said_by, key = found[0]
    word = str(turn[said_by]).lower()
    role = "assistant" if word == CALL_ROLE else ROLES.get(word)
    if role is None:
        allowed = ", ".join([*ROLES, CALL_ROLE])
        fail(name, number, f"{field}.{said_by}", f"unknown role {turn[said_by]!r}", f"Known roles: {allowed}.")
    for each in NOT_READ:
        if turn.get(each):
            fail(
                name,
                number,
                f"{field}.{each}",
                "is not supported",
                "Only whole turns of text are trained: take it out.",
            )
    trained = _trained(turn, role, name, number, field)
    more = {each: turn[each] for each in MORE if turn.get(each) not in (None, "", [], {})}
    text = _content(turn, key, name, number, f"{field}.{key}", calls="tool_calls" in more or "function_call" in more)
    if word == CALL_ROLE:
        text, more = "", {**more, "tool_calls": _calls(text, name, number, f"{field}.{key}")}
    known = {said_by, key, *LOSS_KEYS, *MORE, *NOT_READ}
    left = {each for each in turn if each not in known and turn[each] not in (None, "", [], {})}
    return Message(role, text, trained, more), said_by, left


def _trained(turn: Mapping[str, Any], role: str, name: str, number: int, field: str) -> bool:
    trained = role == "assistant"
    for key in LOSS_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            fail(
                name, number, f"{field}.{key}", f"{value!r} is neither 0 nor 1",
                "A turn is trained (1, true) or not (0, false); other weights are not supported.",
            )  # fmt: skip
        if value and role != "assistant":
            fail(
                name,
                number,
                f"{field}.{key}",
                f"a {role} turn is never trained",
                "Only assistant turns are: take it out.",
            )
        trained = trained and bool(value)
    return trained


def _content(turn: Mapping[str, Any], key: str, name: str, number: int, field: str, *, calls: bool) -> str:
    """Return a turn's text; a list of text parts is joined as chat templates join it."""
    value = turn.get(key)
    if value is None:
        if calls:
            return ""
        fail(name, number, field, "missing: the turn has no text", "Give it, or leave the row out.")
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            kind = part.get("type") or ("text" if "text" in part else "unknown")
            if kind != "text" or not isinstance(part.get("text"), str):
                fail(
                    name, number, field, f"a part of the kind {kind!r}", "Only text is trained: give text parts alone."
                )
        return "".join(part["text"] for part in value).strip()
    return text_of(value, name, number, field)


def _calls(text: str, name: str, number: int, field: str) -> list[dict[str, Any]]:
    """Return OpenAI's form of the calls in a `function_call` turn: {name, arguments} in JSON, or a list of them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        fail(name, number, field, "no JSON of a call", 'Give {"name": ..., "arguments": {...}}.')
    return [{"type": "function", "function": call} for call in calls]
