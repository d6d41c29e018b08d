"""The form of a request for a chat completion, and how it changes where a server asks for another one.

OpenAI's reasoning models refuse `max_tokens` and a temperature of 0, and their reasoning counts as written tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

REASONING_TOKENS = 4096  #: tokens that a reasoning model may write beside its answer
_NO_TEMPERATURE = re.compile(
    r"temperature['\"`]?[:,]?\s*(?:is |does |value )?(?:not support|unsupported|only|must be|deprecated|not allowed)"
    r"|(?:unsupported|not support\w*|unknown|invalid|unrecognized)[^.\n]{0,25}\btemperature\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class RequestForm:
    """limit: the name of the key for the most tokens. temperature: None leaves the server's own. room: tokens that a
    reply may have beyond what its answer needs.
    """

    limit: str = "max_tokens"
    temperature: float | None = 0.0
    room: int = 0

    def content(self, model: str, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """Return the JSON of a request whose answer needs at most `max_tokens`."""
        content: dict[str, Any] = {"model": model, "messages": messages, self.limit: max_tokens + self.room}
        return content if self.temperature is None else content | {"temperature": self.temperature}

    def asked_for(self, error: Mapping[str, Any]) -> RequestForm | None:
        """Return the form that the `error` of a 400 asks for, or None where it is about something else."""
        said, key, code = (str(error.get(name) or "") for name in ("message", "param", "code"))
        unsupported = code in ("unsupported_parameter", "unsupported_value")
        if self.limit == "max_tokens" and ("max_completion_tokens" in said or (unsupported and key == "max_tokens")):
            return replace(self, limit="max_completion_tokens", room=REASONING_TOKENS)
        if self.temperature is not None and ((unsupported and key == "temperature") or _NO_TEMPERATURE.search(said)):
            return replace(self, temperature=None)
        return None

    def with_room(self) -> RequestForm | None:
        """Return the form that leaves room for reasoning, or None where this one does."""
        return None if self.room else replace(self, room=REASONING_TOKENS)

    def __str__(self) -> str:
        temperature = (
            "the server's own temperature" if self.temperature is None else f"temperature {self.temperature:g}"
        )
        room = f", and {self.room:,} tokens of room for reasoning" if self.room else ""
        return f"{self.limit}, {temperature}{room}"
