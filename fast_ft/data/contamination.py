"""Prompts that must not meet: test prompts among training rows, and rows that a recipe keeps out (data.exclude).

`certificate` reports test prompts among the chosen rows and shapes nothing. `data.exclude` names prompts by digests of
their text, so that a recipe holds no rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fast_ft.data.examples import Example, Pool, Prompt
from fast_ft.data.folding import fold, folded, ngrams
from fast_ft.data.formats import strip_lead

GRAM_WORDS = 13
METHOD = (
    "Instruction and input of each training row against those of each test prompt, Alpaca's lead sentence and headings "
    "stripped: exact text, then without case, spaces and the punctuation of sentences, then any "
    f"{GRAM_WORDS} words in a row in common. "
    "Ids are not compared: data sets reuse them for other rows."
)


def certificate(examples: Iterable[Example], prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Return what was compared and every hit, ready for JSON; each pair shows once, under its strongest kind.

    {"examples": int, "prompts": int, "hits": [{"example": id, "prompt": id, "kind": exact | normalised | 13-gram}],
    "method": text}. Each user turn of a prompt is compared by itself. A word is what common/words.py says.
    """
    examples, prompts = list(examples), list(prompts)
    tests = [
        (prompt.id, strip_lead(message["content"]))
        for prompt in prompts
        for message in prompt.messages
        if message["role"] == "user"
    ]
    normalised = folded([text for _, text in tests])
    grams = [_grams(text) for text in normalised]
    hits: dict[tuple[str, str], str] = {}
    for example in examples:
        text = strip_lead(example.prompt)
        same = fold(text)
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


def text_digest(text: str) -> str:
    """Return 16 hex digits of a prompt: equal for texts that differ in case, spaces, punctuation or Alpaca's lead."""
    return _digest(fold(strip_lead(text)))


def digests_of(prompts: Collection[Prompt]) -> set[str]:
    """Return the digests of all user turns of the prompts, and of each prompt's whole text, as a row's `prompt` is."""
    turns = {turn["content"] for prompt in prompts for turn in prompt.messages if turn["role"] == "user"}
    return {text_digest(text) for text in turns | {prompt.all_text for prompt in prompts}}


def excluded_prompts(digests: Collection[str], prompts: Collection[Prompt]) -> list[str]:
    """Return the ids of the prompts that have one of these digests: under rules none may be a test prompt."""
    unwanted = set(digests)
    return [prompt.id for prompt in prompts if digests_of([prompt]) & unwanted]


def without_excluded(pool: Pool, digests: Collection[str]) -> tuple[Pool, int]:
    """Return the pool without the rows whose prompt has one of these digests, and how many rows were left out."""
    unwanted = set(digests)
    if not unwanted:
        return pool, 0
    texts = folded([strip_lead(prompt) for prompt in pool.table["prompt"].to_pylist()])
    kept = [_digest(text) not in unwanted for text in texts]
    return replace(pool, table=pool.table.filter(pa.array(kept))), kept.count(False)


def _digest(folded_text: str) -> str:
    return hashlib.sha256(folded_text.encode()).hexdigest()[:16]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return ngrams(words, GRAM_WORDS) if len(words) >= GRAM_WORDS else set()
