"""From a path or a hub id to raw rows. A file's first bytes tell what kind it is; its name does not.

Read are `datasets.save_to_disk` folders (memory-mapped, without `datasets`, whose import takes a second), Arrow and
Parquet files, JSON, JSONL, and the hub's folders of such files. Pickles are refused, since opening one can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded

#: Keys under which a JSON object may hold its rows.
ROW_KEYS = ("data", "rows", "train", "test", "examples", "instances")
KINDS = "JSON, JSONL, Parquet, Arrow, or a folder that datasets.save_to_disk wrote"
HOMEWORK = "https://github.com/ericsunkuan/ML_Spring2025_HW5"
#: What lies in it; recipes look for these below data/.
HOMEWORK_FILES = ("fastchat_alpaca_52k", "test_set_evol_instruct_150.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: JSON files that hold no rows: those beside the rows of a hub's data set, and a judge's replies beside run folders.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "config.json", "state.json", "verdicts.jsonl")
DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
#: First bytes of files that are no text, and what such a file is.
BINARY = ((b"\x80", "a pickle"), (b"PK", "a zip archive, as torch.save writes"), (b"\x1f\x8b", "gzip"))


@dataclass(frozen=True)
class Source:
    """What was read: rows as Python objects (JSON) or as an Arrow table, and the sha256 over the files' bytes."""

    name: str
    rows: list[Any] | pa.Table
    digest: str


def read(where: str, split: str = "train") -> Source:
    """Read all rows of a file, a folder or a hub id; `split` picks among several splits. Raises InputError."""
    try:
        files = data_files(locate(where), split)
        tables: list[pa.Table] = []
        rows: list[Any] = []
        for file in files:
            content = _read_file(file)
            if isinstance(content, pa.Table):
                tables.append(content)
            else:
                rows.extend(content)
        if tables and rows:
            raise InputError(f"{where}: it mixes JSON with Arrow or Parquet files. Name one file.")
        read_rows = pa.concat_tables(tables, promote_options="default") if tables else rows
        if len(read_rows) == 0:
            raise InputError(f"{where}: it holds no rows. Give a data set with at least one row.")
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
    looks_local = path.suffix in DATA_SUFFIXES or owner in ("data", "runs", "shared") or Path(owner).exists()
    if path.exists() or (HUB_ID.fullmatch(where) and not looks_local):
        return
    hint = f' For the homework: "git clone {HOMEWORK} data".' if path.name in HOMEWORK_FILES else ""
    raise InputError(
        f"{where}: no such file or folder (looked from {Path.cwd()}). Give {KINDS}, or a hub id (owner/name).{hint}"
    )


def data_files(path: Path, split: str) -> list[Path]:
    """Return the files that hold the rows of `path`, in order: itself, or a folder's shards."""
    if not path.is_dir():
        return [path]
    if _is_run(path):
        raise InputError(f"{path}: it is the folder of a run, which holds answers and no rows. Give {KINDS}.")
    if (path / "state.json").is_file():
        state = _json_object(path / "state.json")
        if state.get("_indices_data_files"):
            raise InputError(f"{path}: the data set keeps a row index. Call flatten_indices() before save_to_disk.")
        names = [Path(str(entry.get("filename"))).name for entry in state.get("_data_files") or []]
        missing = [name for name in names if not (path / name).is_file()]
        if missing or not names:
            raise InputError(f"{path}: state.json names {missing or 'no data files'}, not here. Copy the whole folder.")
        return [path / name for name in names]
    if (path / "dataset_dict.json").is_file():
        splits = _json_object(path / "dataset_dict.json").get("splits") or []
        chosen = split if split in splits else splits[0] if len(splits) == 1 else None
        if chosen is None:
            raise InputError(f"{path}: it has the splits {splits}, none called {split}. Name one split's folder.")
        return data_files(path / Path(str(chosen)).name, split)
    for suffix in DATA_SUFFIXES:
        found = sorted(file for place in (path, path / "data") for file in place.glob(f"*{suffix}"))
        found = [file for file in found if file.name not in NOT_ROWS and not file.name.startswith(".")]
        found = [file for file in found if file.stem.startswith(split)] or found
        if len({re.sub(r"-\d{5}-of-\d{5}.*", "", file.name) for file in found}) > 1:
            listed = ", ".join(file.name for file in found[:5])
            raise InputError(f"{path}: several data files ({listed}). Name one of them.")
        if found:
            return found
    raise InputError(f"{path}: a folder without data. Give {KINDS}.")


def _is_run(path: Path) -> bool:
    """Return whether a run wrote this folder: its replies of a judge (verdicts.jsonl) and its log are no rows."""
    manifest = path / "manifest.json"
    return manifest.is_file() and "recipe_digest" in _json_object(manifest)


def _read_file(path: Path) -> list[Any] | pa.Table:
    """Read one file by its first bytes. Raises InputError, pa.ArrowException or OSError."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise InputError(f"{path}: the file is empty. Give {KINDS}.")
    if head.startswith(b"PAR1"):
        import pyarrow.parquet as pq

        return pq.read_table(path)
    if head.startswith(b"ARROW1"):
        return _arrow(path, pa.ipc.open_file)
    if head.startswith(b"\xff\xff\xff\xff"):
        return _arrow(path, pa.ipc.open_stream)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f'{path}: a Git LFS pointer, not the data. Run "git lfs pull" in its repository.')
    kind = next((name for magic, name in BINARY if head.startswith(magic)), None)
    if kind or path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{path}: {kind or 'a pickle'} is not read, since opening one can run code. Give {KINDS}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8, or give {KINDS}.") from error
    if "\x00" in text[:4096]:
        raise InputError(f"{path}: a binary file. Give {KINDS}.")
    return _parse_json(path, text)


def _arrow(path: Path, open_reader: Callable[..., Any]) -> pa.Table:
    with pa.memory_map(str(path)) as mapped, open_reader(mapped) as reader:
        return reader.read_all()


def _parse_json(path: Path, text: str) -> list[Any]:
    """Parse a JSON list, a JSON object that holds or is rows, or JSONL. The error names line and column."""
    if not text.strip():
        raise InputError(f"{path}: the file is empty. Give {KINDS}.")
    lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028
    filled = [number for number, line in enumerate(lines) if line.strip()]
    jsonl = len(filled) > 1 and text.lstrip().startswith("{") and _whole(lines[filled[0]])
    number = 0
    try:
        if jsonl:
            rows = []
            for number in filled:
                rows.append(json.loads(lines[number]))
            return rows
        content = json.loads(text)
    except json.JSONDecodeError as error:
        line = number + 1 if jsonl else error.lineno
        raise InputError(
            f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}. "
            "The file may be cut off: compare its size with the original's."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number + 1}: not usable JSON: {_first_line(error)}. Mend the file.") from error
    if isinstance(content, dict):
        for key in ROW_KEYS:
            if isinstance(content.get(key), list):
                return content[key]
        return [content]
    if not isinstance(content, list):
        raise InputError(f"{path}: holds no rows but one value ({type(content).__name__}). Give a list of objects.")
    return content


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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
