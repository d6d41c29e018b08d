"""What a word is, in any script. Metrics of rows, ROUGE-L and the length of answers all ask this module.

White space separates words. Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan have none between theirs, and only
a dictionary could tell where a word ends; so each of their letters counts as a word, with its marks. Punctuation
belongs to the letter beside it: 好。 is one word, as "good." is. Other text has the words of Python's str.split().
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.text_safety import whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: What ends a sentence, in Latin, Chinese, Arabic, Hindi, Ethiopic, Tibetan and other scripts (Sentence_Terminal).
FINAL = ".!?…‼‽⁇⁈⁉。．｡！？؟۔।॥։።။។།؞፧፨៕༎᠃᠉᱾᱿꯫꩝꩞꩟෴"
#: What may follow it: quotes, brackets, code ticks and markdown stars that close.
CLOSING = "\"'“”‘’»›)]}*_`」』）】》〉〕］｝＂＇"
#: A letter, with its marks, of scripts whose sentences end without a mark: any of their texts may be whole.
UNMARKED = r"[\p{Thai}\p{Lao}]"
#: A character that is drawn as an emoji, and what changes the one before it: skin colour, joiner, keycap, flag.
EMOJI = r"[\x{2600}-\x{27bf}\x{2b00}-\x{2bff}\x{1f000}-\x{1faff}]"
EMOJI_MARKS = r"\x{fe0f}\x{200d}\x{20e3}\x{1f3fb}-\x{1f3ff}\x{e0020}-\x{e007f}"

# RE2's and Unicode's names of the scripts without spaces; ー and half-width kana's marks are in none of them.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Yi")
_UNSPACED = "[" + "".join(rf"\p{{{name}}}" for name in _SCRIPTS) + "ーｰ]"
#: Kinds of characters. From _JOINED on they may end a word; a sign is a letter where no letter is before it.
_LETTER, _JOINED, _OPENING, _SIGN = 1, 2, 3, 4
_ROWS = 8192  # looked at together, which bounds the memory
_WITH_MARKS = rf"({_UNSPACED}\pM*)"
_TAIL = re.compile(f"[{re.escape(FINAL + CLOSING)},;，、；،؛\\s]+$")


def spaced(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the texts with white space between all words, and none around them; most texts are as they were."""
    slices = [texts.slice(start, _ROWS).combine_chunks() for start in range(0, len(texts), _ROWS)]
    return pa.chunked_array([_spaced(each) for each in slices], texts.type)


def words(text: str) -> list[str]:
    """Return a text's words."""
    return _spaced(pa.array([whole(text)]))[0].as_py().split()


def terms(text: str) -> list[str]:
    """Return a text's words as they are compared: in lower case, without punctuation; symbols, where there is no more.

    Of ASCII text these are the tokens of Google's rouge_score.
    """
    text = unicodedata.normalize("NFC", whole(text)).casefold()
    kept = pc.replace_substring_regex(pa.scalar(text), pattern=r"[^\pL\pN\pM]+", replacement=" ")
    return pc.replace_substring_regex(kept, pattern=_WITH_MARKS, replacement=r" \1 ").as_py().split() or list(
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
    beyond_ascii = pc.invert(pc.string_is_ascii(texts))
    some = texts.filter(beyond_ascii)
    if not pc.any(pc.match_substring_regex(some, pattern=_UNSPACED)).as_py():
        return texts
    return pc.replace_with_mask(texts, beyond_ascii, pa.array(_apart(some.to_pylist()), texts.type))


def _apart(texts: list[str]) -> list[str]:
    """Return the texts with spaces around each word of a script without spaces, and none around a text.

    Such a word is one letter, the brackets and quotes that open before it, and the marks and punctuation behind it. All
    characters are looked at side by side: for a text of such letters alone, that is 20 times as fast as a pattern.
    """
    import numpy as np

    codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
    kinds = _kinds(codes)
    letter, opening, sign, joined = kinds == _LETTER, kinds == _OPENING, kinds == _SIGN, kinds >= _JOINED
    places = np.arange(len(codes), dtype=np.int32)
    before = np.maximum.accumulate(np.where(joined, -1, places))  # the last character that no word's tail can hold
    former_sign = np.concatenate([[-1], np.maximum.accumulate(np.where(sign, places, -1))[:-1]])
    behind = joined & ((before >= 0) & letter[before] | (former_sign > before))
    letter = letter | (sign & ~behind)
    after = np.minimum.accumulate(np.where(opening, len(codes) - 1, places)[::-1])[::-1]
    ahead = opening & ~behind & letter[after]
    within = letter | behind | ahead
    former = np.concatenate([[False], within[:-1]])
    led = np.concatenate([[False], ahead[:-1]])
    gaps = np.cumsum(((letter | ahead) & ~led) | (former & ~within))  # up to and before each character
    apart = np.full(len(codes) + gaps[-1], ord(" "), np.uint32)
    apart[places + gaps] = codes
    text = apart.tobytes().decode("utf-32-le")
    ends = np.cumsum([len(each) + 1 for each in texts])
    ends += gaps[np.minimum(ends, len(codes)) - 1]
    starts = [0, *ends[:-1].tolist()]
    return [text[start : end - 1].strip() for start, end in zip(starts, ends.tolist(), strict=True)]


def _kinds(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return what each character is: one of the kinds above, or 0."""
    import numpy as np

    most = int(codes.max(initial=0)) + 1
    seen = np.zeros(most, bool)
    seen[codes] = True
    found = np.flatnonzero(seen)
    characters = pa.array([chr(code) for code in found.tolist()])
    kinds = np.zeros(most, np.uint8)
    joined, opening, letter = (
        pc.match_substring_regex(characters, pattern=pattern).to_numpy(zero_copy_only=False)
        for pattern in (r"[\pM\pP]", r"[\p{Ps}\p{Pi}]", _UNSPACED)
    )
    for kind, those in ((_JOINED, joined), (_OPENING, opening), (_LETTER, letter), (_SIGN, letter & joined)):
        kinds[found[those]] = kind
    return kinds[codes]
