"""A stand-in for a test set: rows that a recipe does not train on, written as prompts with reference answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import atomic_files, seeds
from fast_ft.common.errors import InputError
from fast_ft.common.outputs import check_output
from fast_ft.data import contamination
from fast_ft.data.examples import Example
from fast_ft.data.formats import strip_leads
from fast_ft.data.prepare import SelectedData

_SPEAKERS = {"user": "human", "assistant": "gpt"}  #: ShareGPT's names


def draw(prepared: SelectedData, count: int, seed: int) -> list[Example]:
    """Draw rows at random that have another prompt than every training row and every test prompt; no prompt twice.

    Rows without an answer are passed over. Raises InputError where there are fewer than `count`.
    """
    pool = prepared.selection.pool
    taken = {contamination.text_digest(row.prompt) for row in prepared.examples}
    taken |= contamination.digests_of(prepared.prompts)
    prompts, answered = strip_leads(pool.table["prompt"]), pc.not_equal(pool.table["response"], "")
    places = pc.indices_nonzero(pa.chunked_array(answered.chunks)).to_pylist()
    drawn: list[int] = []
    for place in seeds.generator(seed, "stand-in").sample(places, len(places)):
        if len(drawn) == count:
            break
        text = contamination.text_digest(prompts[place].as_py())
        if text not in taken:
            taken.add(text)
            drawn.append(place)
    if len(drawn) < count:
        raise InputError(
            f"--stand-in {count}: {pool.source} has {len(drawn)} rows with another prompt than the training rows and "
            "the test prompts. Ask for fewer."
        )
    return pool.examples(sorted(drawn))


def write(path: Path, rows: Iterable[Example]) -> None:
    """Write rows as a prompt file with answers: a row's last answer is the reference.

    Raises InputError where `path` is a file that holds anything else.
    """
    content = [
        {
            "id": row.id,
            "conversations": [
                {"from": _SPEAKERS.get(turn.role, turn.role), "value": turn.content, **turn.more}
                for turn in row.messages
            ],
            **({"tools": row.tools} if row.tools else {}),
        }
        for row in rows
    ]
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n]\n"
    check_output(path, lambda former: former == text.encode(), "stand-in.json")
    atomic_files.write_text(path, text)
