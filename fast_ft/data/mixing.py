"""Several sources of training rows as one pool: each row knows its source, which has a `take` and a `weight`.

`take` is the most rows of a source that selection takes: what select.take is for all rows. `weight` is how often an
epoch sees each row of a source. A weight adds no distinct row, so it counts nothing towards any limit of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePath

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common import seeds
from fast_ft.data import dataset, sources
from fast_ft.data.examples import Pool
from fast_ft.recipe.schema import Data, SourceFile


def load_pool(section: Data) -> Pool:
    """Load the training rows of all sources of a recipe's `data` section. Raises InputError.

    Of several sources, a row's id is its source's name, a colon, and its own id: two files may both count from 1.
    """
    files = section.sources
    pools = [dataset.load_pool(section.model_copy(update=_alone(source))) for source in files]
    names = _names(files)
    tables = []
    for index, (pool, name) in enumerate(zip(pools, names, strict=True)):
        table = pool.table.append_column("source", pa.array([index] * len(pool), pa.int16()))
        if len(pools) > 1:
            ids = pc.binary_join_element_wise(pa.scalar(name), table["id"], ":")
            table = table.set_column(table.column_names.index("id"), "id", ids)
        tables.append(table)
    notes = tuple(note for pool in pools for note in pool.notes)
    return Pool(pa.concat_tables(tables), section.train_name, _joined([pool.digest for pool in pools]), notes, files)


def digest(section: Data) -> str:
    """Return the pool's digest, without reading rows. Raises InputError."""
    files = [sources.data_files(sources.locate(each.path), "train", each.split) for each in section.sources]
    return _joined([sources.digest(each) for each in files])


def epoch_rows(weights: Sequence[float]) -> int:
    """Return how many rows an epoch has, each as often as its weight says."""
    return sum(map(int, weights)) + sum(count for _, count in _fractions(weights))


def epoch(weights: Sequence[float], *key: int) -> list[int]:
    """Return the indices of the rows of one epoch, ascending; a fraction of a weight is drawn by the numbers `key`."""
    order = _repeated(weights)
    for rows, count in _fractions(weights):
        order += seeds.generator(*key, "weight").sample(rows, count)
    return sorted(order)


def _repeated(weights: Sequence[float]) -> list[int]:
    return [index for index, weight in enumerate(weights) for _ in range(int(weight))]


def _fractions(weights: Sequence[float]) -> list[tuple[list[int], int]]:
    """Return, for each weight with a fraction, the rows that have it and how many of them an epoch sees once more.

    Of a weight below 1 at least one row is seen, so that no epoch is empty.
    """
    found: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        found.setdefault(weight, []).append(index)
    counts = ((rows, weight, round(weight % 1 * len(rows))) for weight, rows in found.items() if weight % 1)
    return [(rows, count if weight > 1 else max(1, count)) for rows, weight, count in counts]


def _joined(digests: Sequence[str]) -> str:
    """Return one source's digest, or the sha256 over the digests of several."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _alone(source: SourceFile) -> dict[str, object]:
    return {"train": source.path, "split": source.split, "columns": source.columns}


def _names(files: Sequence[SourceFile]) -> list[str]:
    """Return a short name for each source: its file's or folder's, with its split or a number where two are alike."""
    names = [PurePath(source.path.rstrip("/")).name.split(".")[0] or "rows" for source in files]
    for add in (lambda index: files[index].split, lambda index: index + 1):
        alike = [index for index, name in enumerate(names) if names.count(name) > 1 and add(index) is not None]
        for index in alike:
            names[index] = f"{names[index]}-{add(index)}"
    return names
