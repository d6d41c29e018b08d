"""A training row, a prompt, and all rows of a data set: the values that this room's steps hand on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from fast_ft.recipe.schema import SourceFile


@dataclass(frozen=True, slots=True)
class Example:
    """A training row. `score` is the data set's own quality score, or None."""

    id: str
    prompt: str
    response: str
    score: float | None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of prompt and response: the same in every layout, whatever the id."""
        content = {"prompt": self.prompt, "response": self.response}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer: turns of role and content, the last of them the user's."""

    id: str
    messages: tuple[dict[str, str], ...]
    skill: str | None = None
    difficulty: float | None = None

    @property
    def text(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Pool:
    """All rows of a data set, in file order.

    table: columns id, prompt, response (strings), score (float64, null where absent), then metrics. A response may be
    "" (Alpaca has such rows); selection leaves those out. source: as the user gave it. digest: sha256 over the files.
    sources: where the rows come from; the column "source" says of each row, which of them. Both are data/mixing.py's.
    """

    table: pa.Table
    source: str
    digest: str
    sources: tuple[SourceFile, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def weights(self, indices: Sequence[int]) -> list[float]:
        """Return how often an epoch sees the rows at these positions."""
        if "source" not in self.table.column_names:
            return [1.0] * len(indices)
        found = self.table["source"].take(pa.array(indices, pa.int64())).to_pylist()
        return [self.sources[index].weight for index in found]

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Return the rows at these positions (from 0), in the given order."""
        rows = self.table.select(["id", "prompt", "response", "score"]).take(pa.array(indices, pa.int64()))
        return [Example(**row) for row in rows.to_pylist()]
