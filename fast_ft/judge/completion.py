"""A server's reply to a request for a chat completion, as a value: the text, how it ended, and what it cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fast_ft.judge import reading

MOST_TOKENS = 10**7  #: a larger count of tokens in a reply is no count
REASONING = ("reasoning_content", "reasoning")  #: where servers put what a model thought before its answer


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said. `model`: the name that the server gave; token counts are the server's, or None.

    ending: "" for a whole reply, "cut" at its most tokens, "refused" by the model (`text` is then its reason),
    "filtered" by the server, or "reasoning" for a reply without an answer.
    """

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    ending: str = ""


def parse(body: str) -> Reply:
    """Return the reply that a body holds. Raises ValueError where the body is no chat completion."""
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        message = choice["message"]
        said_otherwise = any(message.get(name) for name in ("refusal", *REASONING))
        text = _text(message.get("content") if said_otherwise else message["content"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError("no chat completion") from None
    # The reply is there and paid for, whatever stands around it.
    usage, model = content.get("usage"), content.get("model")
    ending = _ending(choice, message, text)
    if ending == "refused":
        text = str(message["refusal"])
    read, written = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    return Reply(text, model if isinstance(model, str) else "", read, written, ending)


def _text(content: object) -> str:
    """Return the text of a message's content: a text, null, or a list of parts of which those of type text count."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError("its content is no text")
    return content or ""


def _ending(choice: dict[str, Any], message: dict[str, Any], text: str) -> str:
    reason, refusal = choice.get("finish_reason"), message.get("refusal")
    if isinstance(refusal, str) and refusal.strip():
        return "refused"
    if reason == "content_filter":
        return "filtered"
    thought = any(isinstance(message.get(name), str) and message[name] for name in REASONING)
    if not text.strip() and (thought or reason == "length"):
        return "reasoning"
    if reason == "length":
        return "reasoning" if reading.unfinished_thought(text) else "cut"
    return ""


def _count(usage: object, name: str) -> int | None:
    """Return a count of tokens from a reply's `usage`; None where it is absent, or no count."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None  # True is an int, too
