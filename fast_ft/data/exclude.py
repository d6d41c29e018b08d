"""Rows that a recipe keeps out: known by their prompt's text, as digests, so that a recipe holds no rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace

import pyarrow as pa

from fast_ft.data.duplicates import normalise
from fast_ft.data.examples import Pool, Prompt
from fast_ft.data.formats import strip_lead


def text_digest(text: str) -> str:
    """Return 16 hex digits of a prompt: equal for texts that differ in case, spaces, punctuation or Alpaca's lead."""
    return hashlib.sha256(normalise(strip_lead(text)).encode()).hexdigest()[:16]


def digests_of(prompts: Collection[Prompt]) -> set[str]:
    """Return the digests of all user turns."""
    return {text_digest(turn["content"]) for prompt in prompts for turn in prompt.messages if turn["role"] == "user"}


def named(digests: Collection[str], prompts: Collection[Prompt]) -> list[str]:
    """Return the ids of the prompts that these digests keep out: data.exclude must name no test prompt under rules."""
    unwanted = set(digests)
    return [prompt.id for prompt in prompts if digests_of([prompt]) & unwanted]


def without(pool: Pool, digests: Collection[str]) -> tuple[Pool, int]:
    """Return the pool without the rows whose prompt has one of these digests, and how many those were."""
    unwanted = set(digests)
    if not unwanted:
        return pool, 0
    kept = [text_digest(prompt) not in unwanted for prompt in pool.table["prompt"].to_pylist()]
    return replace(pool, table=pool.table.filter(pa.array(kept))), kept.count(False)
