"""Somebody else's text, made fit for a terminal: it may say anything, but draw, move or recolour nothing.

Rows, answers, judges' replies, file names and libraries' messages pass through here on their way to the screen.
"""

from __future__ import annotations

import re
import unicodedata

#: Marks that turn the direction of text (Unicode's Bidi_Control): what reads as one thing is another.
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LINES = frozenset("\u2028\u2029")
_HALVES = re.compile("[\ud800-\udfff]")


def harmless(text: str) -> str:
    """Return the text with control codes, marks of direction and halves of characters shown as \\u001b.

    Line ends and tabs stay, and what joins letters and emoji. What no terminal can print is shown in the same way.
    """
    return "".join(c if c in "\n\t" or not _acts(c) else f"\\u{ord(c):04x}" for c in text)


def whole(text: str) -> str:
    """Return the text with \ufffd for each half of a character, so that UTF-8 can hold it."""
    return _HALVES.sub("\ufffd", text)


def escaped(text: str) -> str:
    """Return the text on one line, with everything that has no shape of its own shown as \\n or \\uXXXX."""
    text = text.replace("\n", "\\n")
    return "".join(c if unicodedata.category(c)[0] != "C" and c not in _LINES else f"\\u{ord(c):04x}" for c in text)


def plain(text: str) -> str:
    """Return the text on one line: any run of white space is one space, and the rest as `harmless` has it."""
    return harmless(" ".join(text.split()))


def character_name(character: str) -> str:
    """Return a character's number and Unicode's name of it: U+0301 COMBINING ACUTE ACCENT."""
    return f"U+{ord(character):04X} {unicodedata.name(character, '(no name)')}"


def _acts(character: str) -> bool:
    if character.isascii():
        return character < " " or character == "\x7f"
    return character in _DIRECTION or character in _LINES or unicodedata.category(character) in ("Cc", "Cs")
