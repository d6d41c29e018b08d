"""Model, tokenizer and data folders: local ones checked, others fetched from the hub, each failure one clear message.

Only safetensors, JSON and tokenizer files are ever fetched: no pickles (.bin, .pt, .pth) and no Python code.
"""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fast_ft import outside
from fast_ft.errors import InputError

TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]  # fmt: skip
CONFIG_FILES = ["config.json", "generation_config.json"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
DATA_FILES = ["*.json", "*.jsonl", "*.parquet", "*.arrow"]
# Meta's and Mistral's second copy of the weights, and other formats' folders.
NOT_WEIGHTS = ["*/*", "consolidated*"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BIG = 3_000_000_000  # bytes: a 7B in 4 bits has 3.9e9
ROOM_FOR_BIG = 6_000_000_000
#: The largest numbers that a config.json may hold: far over any model that one GPU trains, far under what harms.
MOST = {
    "hidden_size": 65_536, "intermediate_size": 524_288, "num_hidden_layers": 512, "num_attention_heads": 1024,
    "num_key_value_heads": 1024, "head_dim": 1024, "vocab_size": 2_000_000, "max_position_embeddings": 100_000_000,
}  # fmt: skip
MOST_HEADER = 100 << 20  #: bytes of a safetensors file's header, as the safetensors library has it


def model_folder(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder with a model's config, tokenizer and, if asked for, safetensors weights.

    A local folder is returned as it is, after a look at config.json and at each weight file's length; a hub id is
    fetched into the hub's cache first. Raises InputError.
    """
    folder = _local(name_or_path, "model")
    if folder is None:
        patterns = CONFIG_FILES + TOKENIZER_FILES + (WEIGHT_FILES if weights else [])
        folder = _fetch(name_or_path, revision, patterns, NOT_WEIGHTS, "model", weights)
    _check_config(folder)
    if weights:
        _check_weights(folder)
    return folder


def tokenizer_folder(name_or_path: str, revision: str | None = None) -> Path:
    """Return the folder with a tokenizer's files, and nothing else fetched. Raises InputError."""
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
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name} is a file; a {what} is a folder (or a hub id such as owner/name): give its folder")
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")) or "\\" in name or "" in parts:
        raise InputError(f"there is no folder {name} here (looked for {path.absolute()}): check the spelling")
    return None


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} is an adapter, not a base model: give the model that it was trained on")
        raise InputError(f"{folder} has no config.json, so it is no model folder in transformers' layout")
    try:
        content = json.loads(outside.text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is garbled ({error}): copy or download the model again") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise InputError(f"{path} has no model_type, so it describes no model: copy or download the model again")
    for key, most in MOST.items():
        value = content.get(key)
        if isinstance(value, int | float) and not 0 <= value <= most:
            raise InputError(f"{path}: {key} is {value:,}; a model has at most {most:,}: get it from its publisher")
    quantised = content.get("quantization_config")
    method = quantised.get("quant_method", "bitsandbytes") if isinstance(quantised, dict) else "bitsandbytes"
    if method != "bitsandbytes":
        raise InputError(f"{path}: quantised by {method!r}; only bitsandbytes is read: give the model unquantised")


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(outside.json_object(index)["weight_map"].values()))
            leaving = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is garbled: copy or download the model again") from None
        if leaving:
            raise InputError(f"{index} names the weight file {leaving[0]!r}, which is not in its folder")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files ({missing[0]}): copy it again"
            )
        files = [folder / name for name in names]
    else:
        # By this name libraries look for it; where it is missing they would take a pickle that lies beside.
        files = sorted(folder.glob("model.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise InputError(_no_weights(str(folder), pickles))
    for path in files:
        if problem := _safetensors_problem(path):
            raise InputError(f"{path} {problem}: copy or download it again")


def _no_weights(name: str, pickles: list[str]) -> str:
    if not pickles:
        return f"{name} holds no weights (model.safetensors, or parts with model.safetensors.index.json)"
    return (
        f"{name} holds weights only as pickles ({pickles[0]}), which can run code when read. Convert them once, "
        "where you trust them: AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder) writes safetensors"
    )


def _safetensors_problem(path: Path) -> str | None:
    """Return what is wrong with a file's length: 8 bytes that give the header's, the JSON header, the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            return "is a git-lfs pointer, not the weights (git lfs pull fetches them)"
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8 or length > MOST_HEADER:
            return "is cut short or no safetensors file"
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return "is no safetensors file"
    return None if size >= 8 + length + end else f"is cut short ({size:,} of {8 + length + end:,} bytes)"


def _fetch(name: str, revision: str | None, allow: list[str], ignore: list[str], kind: str, weights: bool) -> Path:
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
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

    if constants.HF_HUB_OFFLINE:
        try:
            return snapshot(local=True)
        except (LocalEntryNotFoundError, HFValidationError):
            remedy = "unset HF_HUB_OFFLINE once to fetch it, or give a local folder"
            raise InputError(f"{name} is not in the cache, and HF_HUB_OFFLINE keeps the hub away: {remedy}") from None
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=20)
    except HFValidationError:
        raise InputError(f"{name!r} is neither a folder here nor a hub id (owner/name)") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        try:  # what was fetched before is as good, also where the hub is down or the token has gone
            return snapshot(local=True)
        except LocalEntryNotFoundError:
            raise InputError(_explain(error, name, revision, kind)) from None
    siblings = getattr(info, "siblings", None) or []
    files = {s.rfilename: s.size or 0 for s in siblings if _wanted(s.rfilename, allow, ignore)}
    if weights and not any(file.endswith(".safetensors") for file in files):
        pickles = [s.rfilename for s in siblings if Path(s.rfilename).suffix in PICKLES]
        raise InputError(_no_weights(f"{name} on the hub", pickles))
    if not files:
        raise InputError(f"{name} on the hub holds none of the files that are read: {', '.join(allow)}")
    _check_room(name, kind, info.sha, files)
    try:
        return snapshot(local=False)
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError) as error:
        # RuntimeError: hf_xet reports a broken transfer so.
        raise InputError(_explain(error, name, revision, kind, downloading=True)) from None


def _wanted(file: str, allow: list[str], ignore: list[str]) -> bool:
    return any(fnmatch(file, a) for a in allow) and not any(fnmatch(file, i) for i in ignore)


def _check_room(name: str, kind: str, commit: str | None, files: dict[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    def cached(file: str) -> bool:
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
    """Return one sentence with the remedy. The library's own text is left out: it may hold URLs, headers, ids."""
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
