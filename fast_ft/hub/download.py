"""Folders of models, tokenizers and data: a local one is checked, another is fetched from the hub.

Only safetensors, JSON and tokenizer files are ever fetched: no pickles (.bin, .pt, .pth) and no Python code.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded, is_folder
from fast_ft.hub import families, gguf_base
from fast_ft.hub.model_files import PICKLES, check_config, check_weights, no_weights

TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]  # fmt: skip
CONFIG_FILES = ["config.json", "generation_config.json"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
DATA_FILES = [
    f"*.{kind}{packed}"
    for kind in ("json", "jsonl", "csv", "tsv", "parquet", "arrow")
    for packed in ("", ".gz", ".zst")
]
# Meta's and Mistral's second copy of the weights, and other formats' folders.
NOT_WEIGHTS = ["*/*", "consolidated*"]
BIG = 3_000_000_000  # bytes: a 7B in 4 bits has 3.9e9
ROOM_FOR_BIG = 6_000_000_000


#: Whether only the hub's cache is read. `nothing_fetched` sets it, for its own thread and task alone.
_only_cached: ContextVar[bool] = ContextVar("only_cached", default=False)


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Find only what is in the hub's cache while this context lasts: a report on a stranger's run asks no server."""
    token = _only_cached.set(True)
    try:
        yield
    finally:
        _only_cached.reset(token)


def model_folder(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder with a model's config, tokenizer and, with `weights`, safetensors weights.

    A local folder is returned as it is; a hub id is fetched into the hub's cache first, and a .gguf file is converted
    there. Raises InputError, also where config.json is garbled or a weight file is cut short.
    """
    folder = _local(name_or_path, "model")
    if folder is None:
        patterns = CONFIG_FILES + TOKENIZER_FILES + (WEIGHT_FILES if weights else [])
        folder = _fetch(name_or_path, revision, patterns, NOT_WEIGHTS, "model", weights)
    check_config(folder)
    if weights:
        check_weights(folder)
    return folder


def family(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> families.FamilySpec:
    """Return what a model's configuration says; its files are fetched and checked as by model_folder."""
    return families.FamilySpec.of(model_folder(name_or_path, revision, weights=weights))


def tokenizer_folder(name_or_path: str, revision: str | None = None) -> Path:
    """Return the folder with a tokenizer's files; no other file is fetched. Raises InputError."""
    folder = _local(name_or_path, "tokenizer")
    if folder is None:
        folder = _fetch(name_or_path, revision, CONFIG_FILES + TOKENIZER_FILES, NOT_WEIGHTS, "model", False)
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "vocab.json")):
        raise InputError(f"{name_or_path} holds no tokenizer: tokenizer.model or tokenizer.json is needed")
    return folder


def fetch_dataset(name: str) -> Path:
    """Return the folder with a hub data set's JSON, JSONL, parquet or arrow files. Raises InputError."""
    return _fetch(name, None, DATA_FILES, ["dataset_infos.json", ".*"], "dataset", False)


def _local(name: str, what: str) -> Path | None:
    """Return the folder `name`, None if it can only be a hub id, or raise InputError."""
    if is_folder(name):
        return expanded(name)
    if gguf_base.is_named(name):
        return gguf_base.folder(name, convert=not _only_cached.get())
    with contextlib.suppress(OSError):  # a name that no file can have, such as 5,000 letters
        if Path(name).is_file():
            raise InputError(f"{name} is a file; a {what} is a folder, a .gguf file or a hub id such as owner/name")
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")) or "\\" in name or "" in parts:
        raise InputError(f"there is no folder {name} here (looked for {Path(name).absolute()}): check the spelling")
    return None


def _fetch(name: str, revision: str | None, allow: list[str], ignore: list[str], kind: str, weights: bool) -> Path:
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
        """Return the folder of the files, fetched or (local) from the cache."""
        # Always the revision as given, never the commit behind it: the cache finds it by that name when offline.
        path = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            local_files_only=local,
        )
        return Path(str(path))

    if constants.HF_HUB_OFFLINE or _only_cached.get():
        try:
            return snapshot(local=True)
        except (LocalEntryNotFoundError, HFValidationError):
            remedy = "unset HF_HUB_OFFLINE once to fetch it, or give a local folder"
            if _only_cached.get():
                raise InputError(f"{name} is not in the hub's cache, and this command fetches nothing") from None
            raise InputError(f"{name} is not in the cache, and HF_HUB_OFFLINE keeps the hub away: {remedy}") from None
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=20)
    except HFValidationError:
        raise InputError(f"{name!r} is neither a folder here nor a hub id (owner/name)") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        try:  # the cache serves as well where the hub is down or the token is gone
            return snapshot(local=True)
        except LocalEntryNotFoundError:
            raise InputError(_explain(error, name, revision, kind)) from None
    siblings = getattr(info, "siblings", None) or []
    files = {s.rfilename: s.size or 0 for s in siblings if _wanted(s.rfilename, allow, ignore)}
    if weights and not any(file.endswith(".safetensors") for file in files):
        pickles = [s.rfilename for s in siblings if Path(s.rfilename).suffix in PICKLES]
        raise InputError(no_weights(f"{name} on the hub", pickles))
    if not files:
        raise InputError(f"{name} on the hub holds none of the files that are read: {', '.join(allow)}")
    _check_room(name, kind, info.sha, files)
    try:
        return snapshot(local=False)
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError) as error:
        # hf_xet reports a broken transfer as a RuntimeError.
        raise InputError(_explain(error, name, revision, kind, downloading=True)) from None


def _wanted(file: str, allow: list[str], ignore: list[str]) -> bool:
    return any(fnmatch(file, a) for a in allow) and not any(fnmatch(file, i) for i in ignore)


def _check_room(name: str, kind: str, commit: str | None, files: dict[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    def cached(file: str) -> bool:
        """Return whether a file is in the cache already."""
        return isinstance(try_to_load_from_cache(name, file, revision=commit, repo_type=kind), str)

    size = sum(length for file, length in files.items() if not cached(file))
    needed = max(round(size * 1.1), ROOM_FOR_BIG if size > BIG else 0)
    folder = Path(constants.HF_HUB_CACHE).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size and free < needed:
        raise InputError(
            f"{name} takes {size / 1e9:.1f} GB to download and {needed / 1e9:.1f} GB of room, but {folder} has "
            f"{free / 1e9:.1f} GB free: free some, or point HF_HOME at a larger disk"
        )


def _explain(error: BaseException, name: str, revision: str | None, kind: str, downloading: bool = False) -> str:
    """Return one sentence with the remedy, without the library's own text, which may hold URLs, headers and ids."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    chain = list(_chain(error))
    status = next((code for link in chain if (code := _status(link))), None)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    token = "set HF_TOKEN to a token of your account"
    if any(getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return f"the disk is full while {name} is downloaded into {constants.HF_HUB_CACHE}: free some, or set HF_HOME"
    if any(isinstance(link, RevisionNotFoundError) for link in chain):
        return f"{name} has no revision {revision!r} on the hub: check model.revision"
    if any(isinstance(link, GatedRepoError) for link in chain) or status == 403:
        return f"the hub answers {status} for {name}: accept the licence on {page}, then {token}"
    if status == 401:
        return (
            f"the hub answers 401 (not authorised) for {name}: it is misspelt, or private or gated. "
            f"Check the name (it is no folder here either); else accept the licence on {page}, then {token}"
        )
    if status == 404:
        return f"the hub answers 404 (not found) for {name}, and there is no such folder here: check the spelling"
    if status == 429:
        return f"the hub answers 429 (too many requests) for {name}: wait some minutes, or {token} (a higher limit)"
    if status and status >= 500:
        return f"the hub answers {status} (its own trouble) for {name}: try again later, or give a local folder"
    if downloading:
        return f"the download of {name} was interrupted: run the same command again, it goes on where it stopped"
    if status:
        return f"the hub answers {status} for {name}: open {page} to see why"
    return f"there is no folder {name} here, and the hub cannot be reached (no network?): connect, or give a folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
