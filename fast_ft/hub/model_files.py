"""Checks of a base model's folder: config.json's numbers and the weight files' lengths. Pickles are refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from fast_ft.common import host_memory, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.hub import families
from fast_ft.hub.quantisation import HEAD, Quantisation

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: The largest numbers that a config.json may hold: far over any model that one GPU trains, far under what harms.
MOST = {
    "hidden_size": 65_536, "intermediate_size": 524_288, "num_hidden_layers": 512, "num_attention_heads": 1024,
    "num_key_value_heads": 1024, "head_dim": 1024, "vocab_size": 2_000_000, "max_position_embeddings": 100_000_000,
}  # fmt: skip
MOST_HEADER = 100 << 20  #: bytes of a safetensors file's header, as the safetensors library has it


def read_ahead(folder: Path) -> None:
    """Let the system read a model's weights into its page cache, where they leave half of the free memory free.

    The cache is no process's memory, and the system takes it back when it needs room.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not hasattr(os, "posix_fadvise") or sum(file.stat().st_size for file in files) > host_memory.free_bytes() // 2:
        return
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check_config(folder: Path) -> None:
    """Raise InputError where config.json describes no model, or one of absurd size."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} is an adapter, not a base model: give the model that it was trained on")
        raise InputError(f"{folder} has no config.json, so it is no model folder in transformers' layout")
    content = families.read_config(folder)
    if "model_type" not in content:
        raise InputError(f"{path} has no model_type, so it describes no model: copy or download the model again")
    for key, most in MOST.items():
        value = content.get(key)
        if isinstance(value, int | float) and not 0 <= value <= most:
            raise InputError(f"{path}: {key} is {value:,}; a model has at most {most:,}: get it from its publisher")
    quantised = content.get("quantization_config")
    method = quantised.get("quant_method", "bitsandbytes") if isinstance(quantised, dict) else "bitsandbytes"
    if method != "bitsandbytes":
        raise InputError(f"{path}: quantised by {method!r}; only bitsandbytes is read: give the model unquantised")
    if isinstance(quantised, dict) and (quantised.get("load_in_8bit") or not quantised.get("load_in_4bit", True)):
        raise InputError(
            f"{path}: quantised to 8 bits; of bitsandbytes' weights those of 4 bits are read: give the model "
            "unquantised, which model.load_in_4bit=true quantises"
        )
    stored = Quantisation.from_config(content)
    if content.get("tie_word_embeddings") and stored is not None and not stored.leaves(HEAD):
        raise InputError(
            f"{path}: its llm_int8_skip_modules quantise the head, which is one matrix with the embeddings, and "
            f"transformers cannot run that: write {HEAD!r} into that list, or give the model unquantised"
        )


def check_weights(folder: Path) -> None:
    """Raise InputError where weight files are missing, cut short, pickles, or elsewhere than in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(untrusted_files.json_object(index)["weight_map"].values()))
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
        # Libraries look for this name; where it is missing, they would take a pickle beside it.
        files = sorted(folder.glob("model.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise InputError(no_weights(str(folder), pickles))
    for path in files:
        if problem := _safetensors_problem(path):
            raise InputError(f"{path} {problem}: copy or download it again")


def no_weights(name: str, pickles: list[str]) -> str:
    """Return the message about a model without safetensors weights."""
    if not pickles:
        return f"{name} holds no weights (model.safetensors, or parts with model.safetensors.index.json)"
    return (
        f"{name} holds weights only as pickles ({pickles[0]}), which can run code when read. Convert them once, "
        "where you trust them: AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder) writes safetensors"
    )


def _safetensors_problem(path: Path) -> str | None:
    """Return what is wrong with a file's length, or None: it holds the header's length, the header, the data."""
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
