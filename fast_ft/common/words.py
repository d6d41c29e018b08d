"""What a word is, in any script. Metrics of rows, ROUGE-L and the length of answers all ask this module.

White space separates words. Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan have none between theirs, and only
a dictionary could tell where a word ends; so each of their letters counts as a word, with its marks. Punctuation
belongs to the letter beside it: 好。 is one word, as "good." is. Other text has the words of Python's str.split().
"""

from __future__ import annotations

import re
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.text_safety import whole

#: What ends a sentence: in Latin, Chinese, Arabic, Urdu, Hindi, Armenian, Ethiopic, Burmese, Khmer and Tibetan script.
FINAL = ".!?…‼‽⁇⁈⁉。．｡！？؟۔।॥։።။។།"
#: What may follow it: quotes, brackets, code ticks and markdown stars that close.
CLOSING = "\"'“”‘’»›)]}*_`」』）】》〉〕］｝＂＇"
#: A character that is drawn as an emoji, and what changes the one before it: skin colour, joiner, keycap, flag.
EMOJI = r"[\x{2600}-\x{27bf}\x{2b00}-\x{2bff}\x{1f000}-\x{1faff}]"
EMOJI_MARKS = r"\x{fe0f}\x{200d}\x{20e3}\x{1f3fb}-\x{1f3ff}\x{e0020}-\x{e007f}"

# RE2's and Unicode's names of the scripts without spaces; ー and half-width kana's marks are in none of them.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Yi")
_UNSPACED = "[" + "".join(rf"\p{{{name}}}" for name in _SCRIPTS) + "ーｰ]"
_WORD = rf"([\p{{Ps}}\p{{Pi}}]*{_UNSPACED}[\pM\pP]*)"
_LETTER = rf"({_UNSPACED}\pM*)"
_TAIL = re.compile(f"[{re.escape(FINAL + CLOSING)},;，、；،؛\\s]+$")


def spaced(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the texts with white space between all words, and none around them; most texts are as they were."""
    return pa.chunked_array([_spaced(chunk) for chunk in texts.chunks], texts.type)


def words(text: str) -> list[str]:
    """Return a text's words."""
    return _spaced(pa.array([whole(text)]))[0].as_py().split()


def terms(text: str) -> list[str]:
    """Return a text's words as they are compared: in lower case, without punctuation; symbols, where there is no more.

    Of ASCII text these are the tokens of Google's rouge_score.
    """
    text = unicodedata.normalize("NFC", whole(text)).casefold()
    kept = pc.replace_substring_regex(pa.scalar(text), pattern=r"[^\pL\pN\pM]+", replacement=" ")
    return pc.replace_substring_regex(kept, pattern=_LETTER, replacement=r" \1 ").as_py().split() or list(
        "".join(text.split())
    )


def short_form(text: str) -> str:
    """Return a text as exact match compares it: without case, outer spaces and what ends its last sentence.

    Closing quotes and brackets stay, and so do symbols: C++ is not C, 5% is not 5, and 5! is not 5.
    """
    text = unicodedata.normalize("NFC", text).casefold().strip()
    tail = _TAIL.search(text)
    if tail is None or tail.start() == 0:
        return text
    head = text[: tail.start()]
    kept = CLOSING + "!！" if head[-1].isdigit() else CLOSING
    return head + "".join(c for c in tail[0] if c in kept)


def _spaced(texts: pa.Array) -> pa.Array:
    beyond_ascii = pc.invert(pc.string_is_ascii(texts))  # a tenth of the time that the pattern takes
    some = texts.filter(beyond_ascii)
    if not pc.any(pc.match_substring_regex(some, pattern=_UNSPACED)).as_py():
        return texts
    apart = pc.replace_substring_regex(some, pattern=_WORD, replacement=r" \1 ")
    return pc.replace_with_mask(texts, beyond_ascii, pc.utf8_trim_whitespace(apart))
