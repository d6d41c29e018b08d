"""From a path or a hub id to raw rows: which files hold them, which split is meant, and what their columns are called.

Read are `datasets.save_to_disk` folders (memory-mapped, without `datasets`, whose import takes a second), the hub's
folders of data files, and single files. What a file holds is in data/file_formats.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fast_ft.common.errors import InputError, nearest
from fast_ft.common.folders import expanded
from fast_ft.data import delimited
from fast_ft.data.file_formats import KINDS, read_file
from fast_ft.data.splits import SPLITS, names_a_split, split_of, stem

HOMEWORK = "https://github.com/ericsunkuan/ML_Spring2025_HW5"
#: What lies in it; recipes look for these below data/.
HOMEWORK_FILES = ("fastchat_alpaca_52k", "test_set_evol_instruct_150.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: JSON files that hold no rows: those beside the rows of a hub's data set, and a judge's replies beside run folders.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "config.json", "state.json", "verdicts.jsonl")
_PLAIN = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
DATA_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in _PLAIN for packed in ("", ".gz", ".zst"))
#: Keys by which other layouts are known. Where a column map names the prompt, they step aside.
_LAYOUT_KEYS = ("conversations", "messages", "instruction", "Instruction", "prompt", "response", "completion", "output")


@dataclass(frozen=True)
class Source:
    """What was read: rows as Python objects or as an Arrow table, and the sha256 over the files' bytes."""

    name: str
    rows: list[Any] | pa.Table
    digest: str


def read(
    where: str,
    default: str = "train",
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    loosely: bool = False,
) -> Source:
    """Read all rows of a file, a folder or a hub id. Raises InputError.

    split: the split that is meant, which then has to be there; without it, `default` where there are several.
    columns: {our name of a key: the rows' own name}. loosely: a name that no row has is no error.
    """
    try:
        place = locate(where)
        files = data_files(place, default, split)
        tables: list[pa.Table] = []
        rows: list[Any] = []
        cells = False
        for file in files:
            content = read_file(file, split or default)
            if split is not None and file == place and not content.split and not split_of(split, [stem(file.name)]):
                raise InputError(f"{where}: it holds no split {split}, which was asked for. Leave split out.")
            cells = cells or content.cells
            if isinstance(content.rows, pa.Table):
                tables.append(content.rows)
            else:
                rows.extend(content.rows)
        if tables and rows:
            raise InputError(f"{where}: it mixes JSON or CSV with Arrow or Parquet files. Name one file.")
        read_rows = pa.concat_tables(tables, promote_options="default") if tables else rows
        if len(read_rows) == 0:
            raise InputError(f"{where}: it holds no rows. Give a data set with at least one row.")
        if columns:
            read_rows = _renamed(read_rows, columns, where, loosely)
        if cells:
            read_rows = [_numbered(row) for row in read_rows]
        return Source(where, read_rows, digest(files))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: cannot be read: {_first_line(error)}. Get or write the file again.") from error


def digest(files: list[Path]) -> str:
    """Return the sha256 (hex) over the files' bytes, one after another; for one file what `sha256sum` prints."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def locate(where: str) -> Path:
    """Return the local path of `where`, fetching it when it is a hub id ("owner/name" that is no local path)."""
    check_named(where)
    path = expanded(where)
    if path.exists():
        return path
    from fast_ft.hub.download import fetch_dataset  # only a hub id needs the network's modules

    return Path(fetch_dataset(where))


def check_named(where: str) -> None:
    """Raise InputError where `where` is neither here nor a hub id; nothing is fetched."""
    path, owner = expanded(where), where.split("/")[0]
    looks_local = path.name.endswith(DATA_SUFFIXES) or owner in ("data", "runs", "shared") or Path(owner).exists()
    if path.exists() or (HUB_ID.fullmatch(where) and not looks_local):
        return
    hint = f' For the homework: "git clone {HOMEWORK} data".' if path.name in HOMEWORK_FILES else ""
    raise InputError(
        f"{where}: no such file or folder (looked from {Path.cwd()}). Give {KINDS}, or a hub id (owner/name).{hint}"
    )


def data_files(path: Path, default: str, split: str | None = None) -> list[Path]:
    """Return the files that hold the rows of `path`, in order: itself, or a folder's shards.

    split: the split that is meant, or None for `default`, which need not be there. Raises InputError.
    """
    if not path.is_dir():
        return [path]
    if _is_run(path):
        raise InputError(f"{path}: it is the folder of a run, which holds answers and no rows. Give {KINDS}.")
    if (path / "state.json").is_file():
        return _saved(path, split)
    if (path / "dataset_dict.json").is_file():
        splits = [str(each) for each in _json_object(path / "dataset_dict.json").get("splits") or []]
        found = split_of(split or default, splits) or (splits[0] if len(splits) == 1 and split is None else None)
        if found is None:
            raise InputError(
                f"{path}: it has the splits {', '.join(splits) or '(none)'}, none called {split or default}. "
                "Set split to one of them, or name one split's folder."
            )
        return _saved(path / Path(found).name, None)
    for suffix in DATA_SUFFIXES:
        files = sorted(file for place in (path, path / "data") for file in place.glob(f"*{suffix}"))
        files += sorted(file for place in (path, path / "data") for file in place.glob(f"*/*{suffix}")
                        if place != path or file.parent.name != "data")  # fmt: skip
        files = [file for file in files if file.name not in NOT_ROWS and not file.name.startswith(".")]
        if files:
            return _of_split(path, files, default, split)
    raise InputError(f"{path}: a folder without data. Give {KINDS}.")


def _is_run(path: Path) -> bool:
    """Return whether a run wrote this folder: its replies of a judge (verdicts.jsonl) and its log are no rows."""
    manifest = path / "manifest.json"
    return manifest.is_file() and "recipe_digest" in _json_object(manifest)


def _saved(path: Path, split: str | None) -> list[Path]:
    """Return the shards of one data set that datasets.save_to_disk wrote."""
    state = _json_object(path / "state.json")
    if split is not None and state.get("_split") not in (split, *SPLITS.get(split, ())):
        own = state.get("_split")
        raise InputError(
            f"{path}: it is one data set{f', the split {own}' if own else ''}, where the split {split} was asked for. "
            "Leave split out, or name the folder of all splits."
        )
    if state.get("_indices_data_files"):
        raise InputError(f"{path}: the data set keeps a row index. Call flatten_indices() before save_to_disk.")
    names = [Path(str(entry.get("filename"))).name for entry in state.get("_data_files") or []]
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        raise InputError(f"{path}: state.json names {missing or 'no data files'}, not here. Copy the whole folder.")
    return [path / name for name in names]


def _of_split(path: Path, files: list[Path], default: str, split: str | None) -> list[Path]:
    """Return which data files of a folder hold a split, told by their names or by the folders that they are in."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        name = stem(file.name)
        if file.parent not in (path, path / "data"):  # a folder for each split, or for each of several data sets
            name = (
                file.parent.name
                if names_a_split(file.parent.name) or file.parent.name == split
                else f"{file.parent.name}/{name}"
            )
        groups.setdefault(name, []).append(file)
    found = split_of(split or default, groups)
    if found is None and split is None and len(groups) == 1:
        found = next(iter(groups))
    if found is None:
        listed = ", ".join(str(file.relative_to(path)) for file in files[:5])
        wanted = f"none of the split {split}" if split else f"none called {default}"
        raise InputError(f"{path}: several data files ({listed}), {wanted}. Name one of them, or set split.")
    return groups[found]


def _renamed(rows: list[Any] | pa.Table, columns: Mapping[str, str], name: str, loosely: bool) -> list[Any] | pa.Table:
    """Return the rows with our names of keys; a row's own key of such a name steps aside, so that it is not misread."""
    ours = {own: key for key, own in columns.items()}
    keys = rows.column_names if isinstance(rows, pa.Table) else list(_keys(rows))
    if loosely:
        ours = {own: key for own, key in ours.items() if own in keys}
        columns = {key: own for own, key in ours.items()}
    for own, key in ours.items():
        if own not in keys:
            raise InputError(
                f"{name}: data.columns.{key}: no row has the key {own!r}{nearest(own, keys)}. "
                f"Keys found: {', '.join(keys[:12])}."
            )
    layouts = _LAYOUT_KEYS if {"prompt", "messages"} & columns.keys() else ()
    aside = {key: f"{key} (not mapped)" for key in (*layouts, *columns) if key not in ours}
    if isinstance(rows, pa.Table):
        return rows.rename_columns([ours.get(key) or aside.get(key) or key for key in keys])
    return [
        {ours.get(key) or aside.get(key) or key: value for key, value in row.items()} if isinstance(row, dict) else row
        for row in rows
    ]


def _keys(rows: list[Any]) -> dict[str, None]:
    return {key: None for row in rows if isinstance(row, dict) for key in row}


def _numbered(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a text table with its numbers as numbers."""
    return {key: delimited.number(value) if key in delimited.NUMBERS else value for key, value in row.items()}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}. Copy the whole folder again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what datasets.save_to_disk writes. Copy the whole folder again.")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
