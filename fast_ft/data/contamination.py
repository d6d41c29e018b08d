"""The leakage certificate: do the chosen training rows hold test prompts? It reports, and shapes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fast_ft.data.duplicates import ngrams, normalise
from fast_ft.data.examples import Example, Prompt
from fast_ft.data.formats import strip_lead

GRAM_WORDS = 13
METHOD = (
    "Instruction and input of each training row against those of each test prompt, Alpaca's lead sentence and headings "
    "stripped: exact text, then normalised (case, spaces, punctuation), then any "
    f"{GRAM_WORDS} words in a row in common. "
    "Ids are not compared: data sets reuse them for other rows."
)


def certificate(examples: Iterable[Example], prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Return what was compared and every hit, ready for JSON; each pair shows once, under its strongest kind.

    {"examples": int, "prompts": int, "hits": [{"example": id, "prompt": id, "kind": exact | normalised | 13-gram}],
    "method": text}. Several user turns in a prompt are compared each.
    """
    examples, prompts = list(examples), list(prompts)
    tests = [
        (prompt.id, strip_lead(message["content"]))
        for prompt in prompts
        for message in prompt.messages
        if message["role"] == "user"
    ]
    normalised = [normalise(text) for _, text in tests]
    grams = [_grams(text) for text in normalised]
    hits: dict[tuple[str, str], str] = {}
    for example in examples:
        text = strip_lead(example.prompt)
        same = normalise(text)
        own = _grams(same)
        for (id_, test), test_same, test_grams in zip(tests, normalised, grams, strict=True):
            if text == test:
                hits[example.id, id_] = "exact"
            elif same == test_same:
                hits.setdefault((example.id, id_), "normalised")
            elif own & test_grams:
                hits.setdefault((example.id, id_), f"{GRAM_WORDS}-gram")
    found = [{"example": example_id, "prompt": id_, "kind": kind} for (example_id, id_), kind in hits.items()]
    return {"examples": len(examples), "prompts": len(prompts), "hits": found, "method": METHOD}


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return ngrams(words, GRAM_WORDS) if len(words) >= GRAM_WORDS else set()
