"""Keys and tokens in what is about to leave the machine. A finding names file, line and kind, never the value."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: The shapes that well-known services give their keys.
_SHAPES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an AWS key id": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password within an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']{3,}@",
}
_SHAPE = re.compile("|".join(f"(?P<k{index}>{shape})" for index, shape in enumerate(_SHAPES.values())))


def findings(name: str, text: str, secrets: Mapping[str, str]) -> list[str]:
    """Return "NAME, line 3: a GitHub token" for each line of a file's text that holds a key or looks like it."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        kinds = [f"the value of {variable}" for value, variable in secrets.items() if value in line]
        if not kinds and (match := _SHAPE.search(line)):
            kinds = [list(_SHAPES)[int((match.lastgroup or "k0")[1:])]]
        found += [f"{name}, line {number}: {kind}" for kind in kinds]
    return found
