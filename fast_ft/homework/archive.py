"""Read a submission's zip, which somebody else wrote. Nothing of it is written to disk, and nothing of it is run."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.plan.run_plan import RunPlan
from fast_ft.recipe.loader import validated
from fast_ft.recipe.schema import Recipe
from fast_ft.run.manifest import Manifest

MOST_BYTES = 64 << 20  #: unpacked, all members together; a submission has under one MiB
MOST_MEMBERS = 2000
#: `submit` writes DEFLATED. LZMA and bzip2 are left out: a member's header can ask for 4 GiB before it is read.
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: What zipfile raises for wrong bytes. ValueError: a name that is no UTF-8, or an offset before the file's beginning.
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError,
    OverflowError,
)  # fmt: skip


#: What a run is done again by; a run folder's manifest need not have them yet.
_NEEDED = (
    "recipe", "recipe_digest", "rows", "stages", "digests", "plan", "phases.train.backend", "phases.train.dtype",
    "phases.generate.batch_size", "environment.python", "environment.system", "environment.packages",
    "environment.gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """What a zip says of its run."""

    manifest: Manifest
    recipe: Recipe
    plan: RunPlan
    pred: dict[str, str]  #: prompt id -> answer
    pred_digest: str
    program: dict[str, bytes]  #: path below fast_ft/ -> content


def read(path: Path) -> Bundle:
    """Read and check a zip. InputError for one that is damaged, hostile, or no submission."""
    files = members(path)
    tops = {name.split("/")[0] for name in files}
    if len(tops) != 1:
        raise InputError(f"{path}: a submission has one folder at its top, this has {len(tops)}")
    top = f"{tops.pop()}/"
    manifest = _manifest(path, _object(path, files, f"{top}manifest.json"))
    pred = _object(path, files, f"{top}pred.json")
    try:
        answers = {id_: str(entry["output"][0]) for id_, entry in pred.items()}
    except (LookupError, TypeError) as error:
        raise InputError(f"{path}: pred.json holds no answers as generate writes them ({error!r})") from None
    recipe = validated(manifest.recipe, {}, f"{path} (recipe)", consequences=False)
    digest = hashlib.sha256(files[f"{top}pred.json"]).hexdigest()
    program = {name.removeprefix(f"{top}fast_ft/"): content for name, content in files.items() if "/fast_ft/" in name}
    return Bundle(manifest, recipe, RunPlan.from_json(manifest.plan, path), answers, digest, program)


def _manifest(path: Path, content: dict[str, Any]) -> Manifest:
    """Return a zip's manifest. InputError where a value is wrong, or one that is needed is absent."""
    try:
        found = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _refused(path, ".".join(map(str, first["loc"])), first["msg"]) from None
    for dotted in _NEEDED:
        value: Any = content
        for key in dotted.split("."):
            if key not in value:
                raise _refused(path, dotted, "Field required")
            value = value[key]
    commit = found.model.commit if found.model is not None else None
    if commit is not None and not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise _refused(path, "model.commit", "String should be 40 hexadecimal digits")
    return found


def _refused(path: Path, place: str, problem: str) -> InputError:
    text = f"{path}: manifest.json: {escaped(place)}: {escaped(problem)}, so it cannot be done again"
    return InputError(text)


def members(path: Path) -> dict[str, bytes]:
    """Return {name: content} of all files in the zip, after a look at every name and size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            return {entry.filename: _content(path, archive, entry) for entry in entries if not entry.is_dir()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a whole zip file ({escaped(str(error))})") from None


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_MEMBERS:
        raise InputError(f"{path}: {len(entries)} members; a submission has at most {MOST_MEMBERS}")
    if (size := sum(entry.file_size for entry in entries)) > MOST_BYTES:
        raise InputError(f"{path}: {size / 2**20:,.0f} MiB unpacked; a submission has at most {MOST_BYTES >> 20}")
    seen = set()
    for entry in entries:
        name = entry.orig_filename
        parts = name.rstrip("/").split("/")
        if name.startswith("/") or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name) or {"..", ".", ""} & {
            *parts
        }:  # fmt: skip
            raise InputError(f"{path}: the member {escaped(name)!r} would leave its folder. Nothing was unpacked.")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{path}: the member {escaped(name)!r} is no plain file. Nothing was unpacked.")
        if entry.compress_type not in _PACKED:
            raise InputError(
                f"{path}: the member {escaped(name)!r} is compressed by zip's method {entry.compress_type}. Only "
                "deflate is read, as `submit` writes it: pack the folder again"
            )
        if name in seen:
            raise InputError(f"{path}: two members are called {escaped(name)!r}")
        seen.add(name)


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        content = file.read(entry.file_size + 1)  # what is written over a member may be less than what is in it
    if len(content) != entry.file_size:
        raise InputError(f"{path}: the member {escaped(entry.filename)!r} has not the size that the zip gives it")
    return content


def _object(path: Path, files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        raise InputError(f"{path}: holds no {escaped(name)}, so it is no submission")
    return untrusted_files.parsed_object(files[name], f"{path}, {escaped(name)}", "Get the zip again.")
