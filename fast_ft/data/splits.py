"""Names of splits: train, validation, test, and what other programs call them."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Other names of splits, as the hub's libraries know them.
SPLITS = {"train": ("training",), "validation": ("valid", "val", "dev", "eval"), "test": ("testing", "evaluation")}


def split_of(wanted: str, names: Iterable[str]) -> str | None:
    """Return the one of these names that means a split: its own, another name of it, or one that begins with it."""
    names, meanings = list(names), (wanted, *SPLITS.get(wanted, ()))
    for meaning in meanings:
        if meaning in names:
            return meaning
    begun = [name for name in names for meaning in meanings if re.match(rf"{re.escape(meaning)}(?![A-Za-z])", name)]
    begun += [name for name in names for meaning in meanings if re.search(rf"[-_.]{re.escape(meaning)}$", name)]
    return begun[0] if len(set(begun)) == 1 else None


def names_a_split(name: str) -> bool:
    """Return whether a file's, a folder's or a key's name means one of the known splits."""
    return any(split_of(each, [name]) for each in SPLITS)


def stem(file_name: str) -> str:
    """Return a data file's name without its endings and the number of its shard, as in train-00000-of-00002.parquet."""
    return re.sub(r"(-\d{5}-of-\d{5}.*|[-_.]\d+)?(\.\w+)*$", "", file_name)
