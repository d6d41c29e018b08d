"""The data map's content: a column for each metric, row texts in blocks, tokens of the selected rows.

All of it goes into the page compressed. The texts are cut into blocks of rows, so that the page unpacks only the block
of the row that is looked at: 52,002 rows of Alpaca are some 30 MB of text.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from fast_ft.data.examples import Pool
from fast_ft.data.metrics import measure

METRICS = ("conversation_words", "score", "response_words", "prompt_words", "type_token_ratio", "ends_cleanly")
BLOCK_ROWS = 256
NO_GROUP = 255  #: a row of no group
NEUTRAL = -1  #: no stage's and no run's colour
MOST_TOKENISED = 500  #: selected rows beyond these show their text, not their tokens
#: Compressed bytes of text at most, so that a phone can load the page. In base64 they are a third more.
TEXT_BUDGET = 3_000_000


class Group(NamedTuple):
    """Rows that the map marks: positions in the pool, and the number of their colour, which also gives the shape."""

    name: str
    rows: Sequence[int]
    colour: int = 0


@dataclass(frozen=True)
class Points:
    """What the map draws. `facts` is JSON; `blocks` are gzip'd bytes by name, unpacked by the page when needed."""

    facts: dict[str, Any]
    blocks: dict[str, bytes]


def points(
    pool: Pool,
    groups: Sequence[Group],
    rows: Mapping[int, EncodedRow] | None = None,
    encoder: Encoder | None = None,
    text_budget: int = TEXT_BUDGET,
) -> Points:
    """Return the map of a pool.

    groups: such as a stage and its rows; a row belongs to the first group that holds it.
    rows: tokens of selected rows, by position.
    """
    pool = measured(pool)
    names = pool.metrics
    columns = np.stack([_floats(pool.table[name]) for name in names])
    known = [i for i in range(len(names)) if not np.isnan(columns[i]).all()]
    names, columns = [names[i] for i in known], columns[known]
    group_of = np.full(len(pool), NO_GROUP, np.uint8)
    for number, group in reversed(list(enumerate(groups))):
        group_of[list(group.rows)] = number
    blocks = {"columns": _gzip(columns.astype("<f8").tobytes()), "groups": _gzip(group_of.tobytes())}
    texts, shortened = _texts(pool, set(np.flatnonzero(group_of != NO_GROUP).tolist()), text_budget)
    blocks |= {f"text-{number}": block for number, block in enumerate(texts)}
    if rows and encoder is not None:
        tokens = {str(index): _tokens(row, encoder) for index, row in list(rows.items())[:MOST_TOKENISED]}
        blocks["tokens"] = _gzip(_json(tokens))
    facts = {
        "rows": len(pool),
        "columns": [{"name": name, "kind": _kind(columns[i])} for i, name in enumerate(names)],
        "block_rows": BLOCK_ROWS,
        "groups": [
            {"name": group.name, "rows": int((group_of == number).sum()), "colour": group.colour}
            for number, group in enumerate(groups)
        ],
        "tokens": "tokens" in blocks,
        "shortened": shortened,
    }
    return Points(facts, blocks)


def measured(pool: Pool) -> Pool:
    """Return the pool with every metric that needs no tokenizer."""
    return measure(pool, METRICS)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return float64 values, NaN where there is none."""
    return pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy()


def _kind(values: np.ndarray) -> str:
    """Return "count" (whole numbers of many values), "level" (few values: points are spread out) or "number"."""
    finite = values[~np.isnan(values)]
    distinct = np.unique(finite[:20_000])
    if len(distinct) <= 25:
        return "level"
    return "count" if np.all(finite == np.round(finite)) and finite.min() >= 0 else "number"


def _texts(pool: Pool, selected: set[int], budget: int) -> tuple[list[bytes], int | None]:
    """Return blocks of [id, prompt, response] and, where texts had to be cut to fit the budget, to how many characters.

    Selected rows stay whole. What a cut saves is only known when it is made, so cuts get deeper until all fits.
    """
    table = pool.table.select(["id", "prompt", "response"])
    starts = range(0, len(pool), BLOCK_ROWS)

    def block(start: int, limit: int | None) -> bytes:
        part = table.slice(start, BLOCK_ROWS).to_pydict()
        entries = [
            [_cut(text, limit if start + i not in selected else None) for text in entry]
            for i, entry in enumerate(zip(part["id"], part["prompt"], part["response"], strict=True))
        ]
        return _gzip(_json(entries))

    def within(limit: int | None) -> list[bytes] | None:
        blocks, size = [], 0
        for start in starts:
            blocks.append(block(start, limit))
            size += len(blocks[-1])
            if size > budget and limit != 40:
                return None
        return blocks

    limit: int | None = None
    while (blocks := within(limit)) is None:
        guess = sum(len(block(start, limit)) for start in starts[::8]) * 8  # all of them would take seconds
        longest = 2 * (pc.mean(pc.utf8_length(table["response"])).as_py() or 1.0) if limit is None else limit
        limit = max(40, int(longest * min(0.8, 0.95 * budget / guess)))
    return blocks, limit


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit] + " […]"


def _tokens(row: EncodedRow, encoder: Encoder) -> dict[str, Any]:
    """Return the pieces of a row's tokens, the places of control tokens, and runs of masked and trained ones.

    runs: lengths in turn, masked first, so [12, 30] is 12 masked tokens and then 30 trained ones.
    """
    runs, trained = [0], False
    for label in row.labels:
        if (label != IGNORE_INDEX) != trained:
            trained = not trained
            runs.append(0)
        runs[-1] += 1
    shown = encoder.shown(row.input_ids)
    return {
        "pieces": [piece for piece, _ in shown],
        "controls": [place for place, (_, is_control) in enumerate(shown) if is_control],
        "runs": runs,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 6, mtime=0)
