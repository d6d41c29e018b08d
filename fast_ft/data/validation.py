"""Validation rows: kept out of training by their text, so that their loss is that of rows not seen in training."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from fast_ft.common import seeds
from fast_ft.common.errors import InputError
from fast_ft.data import dataset, selection
from fast_ft.data.examples import Pool
from fast_ft.data.folding import folded
from fast_ft.data.formats import strip_lead
from fast_ft.data.metrics import TokenCounter
from fast_ft.recipe.schema import Data, Select


def hold_out(
    pool: Pool, data: Data, select: Select, seed: int, token_counter: TokenCounter | None
) -> tuple[Pool, selection.Selection, str]:
    """Return the rows that may be trained on, the validation rows, and a sentence on both.

    Rows of a file are taken as they are. Rows of the training pool are drawn by the seed from those that pass
    select.where and select.reject. No row is trained on whose prompt and response fold to those of a validation row.
    Raises InputError.
    """
    section = data.held_out
    assert section is not None
    if section.path is not None:
        own = data.model_copy(update={"train": section.path, "split": section.split})
        pool_asked = dataset.load_pool(own, "validation")
        chosen = Select(take=section.take)
    else:
        pool_asked, chosen = pool, Select(take=section.take, where=select.where, reject=select.reject)
    method = "top" if section.take is None else "random"
    drawn = selection.select(
        pool_asked, chosen.model_copy(update={"method": method}),
        seed=seeds.derive(seed, "validation rows"), limit=None, token_counter=token_counter,
    )  # fmt: skip
    if section.take is not None and len(drawn.indices) < section.take:
        raise InputError(
            f"data.validation: {section.take} rows are asked for, where {pool_asked.source} has {len(drawn.indices)} "
            "different ones that pass. Take fewer."
        )
    kept_out = set(_keys(Pool(drawn.pool.table.take(pa.array(drawn.indices, pa.int64())), "", "")))
    mask = [key not in kept_out for key in _keys(pool)]
    if not any(mask):
        raise InputError("data.validation: no row is left to train on. Take fewer validation rows.")
    said = f"{len(drawn.indices):,} validation rows; {mask.count(False):,} rows of their texts are not trained on."
    return replace(pool, table=pool.table.filter(pa.array(mask))), drawn, said


def _keys(pool: Pool) -> list[tuple[str, str]]:
    prompts = folded([strip_lead(text) for text in pool.table["prompt"].to_pylist()])
    return list(zip(prompts, folded(pool.table["response"].to_pylist()), strict=True))
