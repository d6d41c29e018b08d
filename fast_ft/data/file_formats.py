"""What kind a file is, told by its bytes and not by its name, and the rows that it holds.

Read are Arrow and Parquet files, JSON, JSONL, CSV and TSV, and each of them packed by gzip or zstd. Any other kind is
refused by its own name, and a pickle is never opened, since opening one can run code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fast_ft.common.errors import InputError
from fast_ft.data import delimited, json_rows

KINDS = (
    "JSON, JSONL, CSV, TSV, Parquet, Arrow (each may be packed by gzip or zstd), or a folder that "
    "datasets.save_to_disk wrote"
)
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
MOST_UNPACKED = 2 << 30  #: bytes that a packed file may unpack to; all of the homework's 52,002 rows are 40 million
PICKLE = ("a pickle", "")
_EXPORT = "Export it as CSV (UTF-8) or JSON."
_UNPACK = "Unpack it, and name the file that is in it."
#: First bytes of files that are not read: what such a file is, and the remedy.
OTHERS = (
    (b"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "an old Office file, such as xls", _EXPORT),
    (b"BZh", "bzip2", _UNPACK), (b"\xfd7zXZ\x00", "xz", _UNPACK), (b"\x04\x22\x4d\x18", "lz4", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK), (b"Rar!", "a rar archive", _UNPACK),
    (b"%PDF", "a PDF document", "Give the rows as JSON or CSV."),
    (b"\x93NUMPY", "a NumPy array", _EXPORT), (b"\x89HDF", "an HDF5 file", _EXPORT),
    (b"ORC", "an ORC file", _EXPORT), (b"Obj\x01", "an Avro file", _EXPORT), (b"FEA1", "an old Feather file", _EXPORT),
)  # fmt: skip
ENCODINGS = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


class Content(NamedTuple):
    """A file's rows: Python objects or an Arrow table.

    cells: all values are text, numbers too. split: the rows are those of the split that was asked for.
    """

    rows: list[Any] | pa.Table
    cells: bool = False
    split: bool = False


def read_file(path: Path, split: str) -> Content:
    """Read one file; of a JSON object that holds several splits, `split`.

    Raises InputError, pa.ArrowException or OSError.
    """
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty. Give {KINDS}.")
    with pa.memory_map(str(path)) as mapped:
        buffer = mapped.read_buffer()
    how = next((name for magic, name in PACKED.items() if _head(buffer).startswith(magic)), None)
    if how is not None:
        buffer = _unpacked(buffer, how, path)
    head = _head(buffer)
    if head.startswith(b"PAR1"):
        import pyarrow.parquet as pq

        return Content(pq.read_table(pa.BufferReader(buffer)))
    if head.startswith(b"ARROW1"):
        return Content(pa.ipc.open_file(buffer).read_all())
    if head.startswith(b"\xff\xff\xff\xff"):
        return Content(pa.ipc.open_stream(buffer).read_all())
    _refuse_others(path, head, how)
    return _text_rows(path, _decoded(path, buffer), split)


def _head(buffer: pa.Buffer) -> bytes:
    return buffer.slice(0, min(512, buffer.size)).to_pybytes()


def _unpacked(buffer: pa.Buffer, how: str, path: Path) -> pa.Buffer:
    """Return what a packed file holds. InputError where that is too much, or where the file is damaged."""
    out = pa.BufferOutputStream()
    try:
        with pa.CompressedInputStream(pa.BufferReader(buffer), how) as stream:
            while block := stream.read(1 << 20):
                out.write(block)
                if out.tell() > MOST_UNPACKED:
                    raise InputError(
                        f"{path}: {how} that unpacks to over {MOST_UNPACKED:,} bytes, the most that is read. "
                        "Unpack it yourself, and name the file that is in it."
                    )
    except OSError as error:
        raise InputError(
            f"{path}: {how}, damaged or cut off: {str(error).rstrip('. ')}. Get the file again."
        ) from error
    if not out.tell():
        raise InputError(f"{path}: {how} with an empty file in it. Give {KINDS}.")
    return out.getvalue()


def _refuse_others(path: Path, head: bytes, how: str | None) -> None:
    """Raise InputError for a file of a kind that is known and not read."""
    packed = f" packed by {how}" if how else ""
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f'{path}: a Git LFS pointer, not the data. Run "git lfs pull" in its repository.')
    kind, remedy = "", ""
    if head.startswith(b"PK"):
        kind, remedy = _zip_kind(path)
    elif head.startswith(b"\x80") or path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"):
        kind, remedy = PICKLE
    elif head[257:262] == b"ustar":
        kind, remedy = "a tar archive", _UNPACK
    elif how and (inner := next((name for magic, name in PACKED.items() if head.startswith(magic)), None)):
        kind, remedy = inner, "Unpack it once."
    else:
        kind, remedy = next(((each, way) for magic, each, way in OTHERS if head.startswith(magic)), ("", ""))
    if kind and not remedy:
        raise InputError(f"{path}: {kind}{packed} is not read, since opening one can run code. Give {KINDS}.")
    if kind:
        raise InputError(f"{path}: {kind}{packed} is not read. {remedy}")


def _zip_kind(path: Path) -> tuple[str, str]:
    """Return what a zip archive is, by the names in it (nothing is unpacked), and the remedy; "" for a pickle's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        names = []
    if any(name.startswith("xl/") for name in names) or path.suffix.lower() in (".xlsx", ".xlsm"):
        return "an Excel workbook (xlsx)", "Save its sheet as CSV (UTF-8), and name that file."
    if any(name.startswith("word/") for name in names):
        return "a Word document (docx)", "Give the rows as JSON or CSV."
    if any(name.endswith("content.xml") for name in names):
        return "an OpenDocument file (ods, odt)", _EXPORT
    if any(name.endswith(".pkl") for name in names) or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "a zip archive with a pickle in it, as torch.save writes it,", ""
    if any(name.endswith(".npy") for name in names):
        return "a zip archive of NumPy arrays (npz)", _EXPORT
    return "a zip archive", _UNPACK


def _decoded(path: Path, buffer: pa.Buffer) -> str:
    """Return a file's text. InputError where it is not UTF-8."""
    head = _head(buffer)
    if found := next((name for magic, name in ENCODINGS if head.startswith(magic)), None):
        raise InputError(f"{path}: not UTF-8 text but {found}. Save it as UTF-8.")
    try:
        text = str(memoryview(buffer), "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8, or give {KINDS}.") from error
    if "\x00" in text[:4096]:
        raise InputError(f"{path}: a binary file. Give {KINDS}.")
    if not text.strip():
        raise InputError(f"{path}: the file is empty. Give {KINDS}.")
    return text


def _json(path: Path, text: str, split: str) -> Content:
    rows, found = json_rows.rows(text, str(path), split)
    return Content(rows, split=found)


def _text_rows(path: Path, text: str, split: str) -> Content:
    start = text[:256].lstrip()
    if start[:1] in ("{", "["):
        return _json(path, text, split)
    if start[:5].lower() in ("<!doc", "<html"):
        raise InputError(f"{path}: a web page (HTML), perhaps shown in place of the file. Fetch the file itself.")
    if start.startswith("<?xml"):
        raise InputError(f"{path}: XML is not read. {_EXPORT}")
    if between := delimited.delimiter(text):
        return Content(delimited.rows(text, str(path), between), cells=True)
    if start[:1].isdigit() or start[:1] in ('"', "-") or start.rstrip() in ("null", "true", "false"):
        return _json(path, text, split)  # one JSON value, which it names
    raise InputError(
        f"{path}: text that is neither JSON nor a table: a table begins with a line of at least two columns' names. "
        f"Give {KINDS}."
    )
