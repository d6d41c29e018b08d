"""Metrics of rows, as Arrow columns: 52,002 rows are measured in tenths of a second, without a loop over rows.

common/words.py says what a word is. Only metrics that somebody names are computed. A new metric is a function in
_COMPUTE here, and a name in recipe/schema_values.py's METRICS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import words as text_words
from fast_ft.common.errors import InputError
from fast_ft.data import asked_length
from fast_ft.data.examples import Pool
from fast_ft.recipe.conditions import check_metric

#: A pool -> the number of tokens of each row that are masked, and of those that are trained.
TokenCounter = Callable[[Pool], tuple[list[int], list[int]]]

#: Final punctuation, an emoji, or a letter of a script without such marks; then closing quotes, brackets, ticks, stars.
FINAL = (
    rf"([{re.escape(text_words.FINAL)}]|{text_words.EMOJI}|{text_words.UNMARKED})"
    rf"[{re.escape(text_words.CLOSING)}{text_words.EMOJI_MARKS}\s]*$"
)
#: A last line that holds only a list's number ("3.") is where a list was cut off; a whole answer may be "16.".
CUT_LIST = r"\n\s*\d+\.\s*$"
FENCE = "```"
#: Rows whose words are held at once for type_token_ratio, which bounds its memory.
SLICE_ROWS = 8192


def measure(pool: Pool, names: Iterable[str], token_counter: TokenCounter | None = None) -> Pool:
    """Return the pool with a column for each named metric that it lacks.

    Counts are int64 words or tokens, ends_cleanly is boolean, type_token_ratio float64 in (0, 1],
    length_missed float64 from 0. Raises InputError for
    a token metric without a token_counter.
    """
    table = pool.table
    for name in dict.fromkeys(names):
        check_metric(name, "select")
        if name in table.column_names:
            continue
        if name.endswith("_tokens"):
            for metric, column in _tokens(pool, name, token_counter).items():
                if metric not in table.column_names:
                    table = table.append_column(metric, column)
        else:
            table = table.append_column(name, _COMPUTE[name](table))
    return pool if table is pool.table else replace(pool, table=table)


def _words(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the number of words of each text; texts have no outer whitespace, and "" has none."""
    counts = pc.list_value_length(pc.utf8_split_whitespace(text_words.spaced(texts))).cast(pa.int64())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(0, pa.int64()), counts)


def _ends_cleanly(table: pa.Table) -> pa.ChunkedArray:
    """Return whether each response is whole: final punctuation at its end, or a closed code block.

    "After a few years," is not whole, and neither is an open code fence, a bare list number or a signature. A cut text
    and a whole one look alike without punctuation, and a wrongly dropped row costs less than a cut one in training.
    """
    responses = table["response"]
    tails = pc.utf8_slice_codeunits(responses, -64)
    final = pc.and_not(
        pc.match_substring_regex(tails, pattern=FINAL), pc.match_substring_regex(tails, pattern=CUT_LIST)
    )
    fences = pc.count_substring(responses, pattern=FENCE)
    closed = pc.equal(pc.bit_wise_and(fences, 1), 0)
    block = pc.and_(pc.ends_with(responses, pattern=FENCE), pc.greater(fences, 0))
    return pc.and_(closed, pc.or_(final, block))


def _type_token_ratio(table: pa.Table) -> pa.ChunkedArray:
    """Return distinct words / words of each response, case ignored; null for an empty one."""
    parts = []
    for start in range(0, table.num_rows, SLICE_ROWS):
        texts = pc.utf8_lower(text_words.spaced(table["response"].slice(start, SLICE_ROWS))).combine_chunks()
        words = pc.utf8_split_whitespace(texts)
        pairs = pa.table({"row": pc.list_parent_indices(words), "word": pc.list_flatten(words)})
        counts = pairs.group_by("row", use_threads=False).aggregate([("word", "count_distinct"), ("word", "count")])
        counts = counts.sort_by("row")  # every text gives a word, if only "": rows stay aligned
        ratio = pc.divide(counts["word_count_distinct"].cast(pa.float64()), counts["word_count"])
        parts += pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.float64()), ratio).chunks
    return pa.chunked_array(parts, pa.float64())


def _length_missed(table: pa.Table) -> pa.ChunkedArray:
    """Return by what share each response misses the number of words that its prompt asks for; 0 where none is asked."""
    asks = pc.match_substring_regex(table["prompt"], pattern=asked_length.MENTIONS)
    texts = table.select(["prompt", "response"]).filter(asks).to_pylist()
    shares = pa.array([asked_length.missed(**row) for row in texts], pa.float64())
    none = pa.repeat(pa.scalar(0.0), table.num_rows)
    return pa.chunked_array([pc.replace_with_mask(none, pa.array(asks.to_pylist(), pa.bool_()), shares)])


def _tokens(pool: Pool, name: str, counter: TokenCounter | None) -> dict[str, pa.Array]:
    if counter is None:
        raise InputError(f"{name}: counting tokens needs a tokenizer: set model.tokenizer to a folder or a hub id.")
    prompt, response = counter(pool)
    assert len(prompt) == len(response) == len(pool)
    columns = {"prompt_tokens": pa.array(prompt, pa.int64()), "response_tokens": pa.array(response, pa.int64())}
    return columns | {"conversation_tokens": pc.add(columns["prompt_tokens"], columns["response_tokens"])}


_COMPUTE: dict[str, Callable[[pa.Table], pa.ChunkedArray]] = {
    "prompt_words": lambda table: _words(table["prompt"]),
    "response_words": lambda table: _words(table["response"]),
    "conversation_words": lambda table: pc.add(_words(table["prompt"]), _words(table["response"])),
    "ends_cleanly": _ends_cleanly,
    "type_token_ratio": _type_token_ratio,
    "length_missed": _length_missed,
}
