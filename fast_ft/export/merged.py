"""The adapter added to its base: a model of 16-bit weights in the hub's form, written tensor by tensor.

A LoRA layer computes W x + s B A x, so W + s B A is the same layer without an adapter (s is alpha / r, or
alpha / sqrt(r) with rsLoRA; source: PEFT's LoraLayer and LoraConfig). The base may lie in 16 or 32 bits, or in
bitsandbytes' 4 bits, of which each tensor is then dequantised. One tensor is in memory at a time.

Shapes: O outputs, I inputs, R the adapter's rank.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.hub.families import read_config, read_generation_config
from fast_ft.models import lora_files, nf4, tensor_file

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 2 << 30  #: bytes of one weight file
TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_QUANTISED = ".quant_state.bitsandbytes__"
#: What a base's dtype is written as; float32 is kept for a base that has it only where the user asks.
DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class BaseWeights:
    """The tensors of a base's weight files by name, read one at a time; 4-bit ones are dequantised.

    A file is opened for each tensor and closed again: a mapped file would count as this process's memory.
    """

    folder: Path
    places: dict[str, Path] = field(default_factory=dict)  #: tensor -> file

    def __post_init__(self) -> None:
        """Read the files' headers."""
        from safetensors import safe_open

        for path in sorted(self.folder.glob("model*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), path)

    def names(self) -> list[str]:
        """Return the names of the weights themselves, without the parts of their quantisation."""
        inner = {name.partition(_QUANTISED)[0] for name in self.places if _QUANTISED in name}
        parts = tuple(f"{name}." for name in inner)
        return sorted(name for name in self.places if not name.startswith(parts) or name in inner)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, as it is when dequantised."""
        if (key := self._state_key(name)) is not None:
            state = json.loads(bytes(self._raw(key).tolist()))
            return tuple(state["shape"])
        from safetensors import safe_open

        with safe_open(str(self.places[name]), framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def get(self, name: str, device: str) -> Tensor:
        """Return a weight in the dtype that it is stored in, or in float32 where that has 4 bits, on a device."""
        key = self._state_key(name)
        if key is None:
            return self._raw(name).to(device)
        import torch
        from bitsandbytes.functional import QuantState

        prefix = f"{name}."
        parts = {part: self._raw(part) for part in self.places if part.startswith(prefix)}
        state = QuantState.from_dict({part.removeprefix(prefix): value for part, value in parts.items()}, device=device)
        return nf4.dequantised(self._raw(name).to(device), state, torch.float32)

    def _state_key(self, name: str) -> str | None:
        keys = (f"{name}{_QUANTISED}{kind}" for kind in ("nf4", "fp4"))
        return next((key for key in keys if key in self.places), None)

    def _raw(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self.places[name]), framework="pt") as file:
            return file.get_tensor(name)


@dataclass
class AdapterWeights:
    """A LoRA adapter's matrices, which are small: all of them are held, by the base's names of weights."""

    folder: Path

    def __post_init__(self) -> None:
        """Read adapter_config.json and the tensors. Raises InputError for a kind of adapter that is not merged."""
        from safetensors.torch import load_file

        path = self.folder / "adapter_config.json"
        self.config = untrusted_files.json_object(path)
        odd = [key for key in ("fan_in_fan_out", "rank_pattern", "alpha_pattern") if self.config.get(key)]
        if odd or self.config.get("bias", "none") != "none":
            raise InputError(
                f"{path}: an adapter with {odd[0] if odd else 'bias'} is not merged here. Merge it with PEFT: "
                "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(folder)"
            )
        r, alpha = self.config["r"], self.config["lora_alpha"]
        self.scale: float = alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r
        self.tensors = {
            name.removeprefix("base_model.model."): tensor
            for name, tensor in load_file(str(self.folder / "adapter_model.safetensors")).items()
        }
        self.used: set[str] = set()

    def replacement(self, name: str) -> Tensor | None:
        """Return the weight that was trained whole in place of the base's (modules_to_save), or None."""
        if name in self.tensors:
            self.used.add(name)
        return self.tensors.get(name)

    def added_to(self, name: str, weight_OI: Tensor) -> Tensor:
        """Return a weight with its LoRA added, in float32; as it is where the adapter has none for it."""
        module = name.removesuffix(".weight")
        keys = [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
        if keys[0] not in self.tensors:
            return weight_OI
        self.used |= {*keys}
        a_RI, b_OR = (self.tensors[key].to(weight_OI.device).float() for key in keys)
        merged_OI = weight_OI.float() + self.scale * (b_OR @ a_RI)
        magnitude = f"{module}.lora_magnitude_vector"
        if magnitude in self.tensors:  # DoRA (arXiv 2402.09353): each output's row has a learnt length
            self.used.add(magnitude)
            length_O = self.tensors[magnitude].to(weight_OI.device).float()
            merged_OI = merged_OI * (length_O / merged_OI.norm(dim=1))[:, None]
        return merged_OI

    def touches(self, *modules: str) -> bool:
        """Return whether a tensor belongs to one of these modules."""
        return any(f"{module}." in name for name in self.tensors for module in modules)

    def unused(self) -> list[str]:
        """Return the tensors that no weight of the base took."""
        return sorted(self.tensors.keys() - self.used)


def merge_into(
    folder: Path,
    base: Path,
    adapter: Path,
    *,
    tokenizer: Path,
    dtype: str = "float16",
    template: str | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Fill an empty folder with base and adapter as one model.

    Args:
        folder: where config, weights and tokenizer go.
        base: the folder of the base model, in 16, 32 or bitsandbytes' 4 bits.
        adapter: the folder of the LoRA adapter that was trained on it.
        tokenizer: the folder of the tokenizer that the run used; often the base's.
        dtype: of the written weights; one of DTYPES.
        template: a chat template in Jinja, where the tokenizer has none of its own.
        end_ids: the tokens that end an answer, for generation_config.json.

    Raises:
        InputError: the adapter does not fit the base, or has tensors that no weight of the base takes.
    """
    lora_files.check(adapter, base)
    weights, lora = BaseWeights(base), AdapterWeights(adapter)
    config = read_config(base)
    if config.get("tie_word_embeddings") and lora.touches("lm_head", "embed_tokens"):
        raise InputError(
            f"{adapter} changes the head or the embeddings, which are one tensor in {base}: a merged model cannot hold "
            "the change. Serve the adapter as it is, or train without lm_head and embed_tokens."
        )
    shards = list(_shards(weights, dtype))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, entries in zip(names, shards, strict=True):
        make = partial(_merged, weights=weights, lora=lora, dtype=dtype)
        tensor_file.save_each(folder / name, entries, make, {"format": "pt"})
    if left := lora.unused():
        raise InputError(
            f"{adapter}: {len(left)} of its tensors belong to no weight of {base}, such as {left[0]}: nothing was "
            "written. Is it the base that the adapter was trained on?"
        )
    if len(shards) > 1:
        places = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        total = sum(entry.size for entries in shards for entry in entries)
        content = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", content)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    _write_json(folder / "config.json", plain | {"dtype": dtype})
    ends = {"eos_token_id": [*end_ids]} if end_ids else {}
    _write_json(folder / "generation_config.json", read_generation_config(base) | ends)
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _merged(name: str, weights: BaseWeights, lora: AdapterWeights, dtype: str) -> Tensor:
    """Return a weight as it is written, on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = lora.replacement(name)
    tensor = whole if whole is not None else lora.added_to(name, weights.get(name, device))
    return _as(tensor, dtype).cpu()


def _as(tensor: Tensor, dtype: str) -> Tensor:
    import torch

    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


def _shards(weights: BaseWeights, dtype: str) -> Iterator[list[tensor_file.Entry]]:
    """Yield the entries of each weight file, in the order of names, each file at most SHARD bytes or one tensor."""
    import torch

    entries: list[tensor_file.Entry] = []
    for name in weights.names():
        entry = tensor_file.Entry(name, getattr(torch, dtype), weights.shape(name))
        if entries and sum(each.size for each in entries) + entry.size > SHARD:
            yield entries
            entries = []
        entries.append(entry)
    yield entries


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
