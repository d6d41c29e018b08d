"""A .gguf file as base model: converted once into a folder with config.json, safetensors weights and a tokenizer.

The folder lies beside the hub's cache (HF_HOME/fast_ft-gguf), and its name holds the file's SHA-256: another file, or
the same one changed, is converted again. Weights are written in float16. What the conversion does not know is refused:
a model that is read wrongly trains and answers without an error.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package, by llama.cpp's authors, reads it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.atomic_files import check_space, refusal, replace_folder, sha256_file, write_json
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.hub import gguf_tokenizer
from fast_ft.hub.gguf_metadata import Metadata

if TYPE_CHECKING:
    import numpy

SMOLLM = "smollm2-135m-instruct.gguf"  #: the file that `make smollm` fetches, and recipes/smollm.yaml names
_FORM = 1  #: of what is written; another number converts every file again
_SHARD = 2_000_000_000  #: bytes of weights that are in memory at once, and in one file
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
}  # fmt: skip
_REMEDY = "Give the model as a folder with config.json and safetensors, or by its hub id."


def is_named(name: str) -> bool:
    """Return whether a model's name means a .gguf file: a hub id never ends like this."""
    return name.lower().endswith(".gguf")


def folder(name: str, *, convert: bool = True) -> Path:
    """Return the folder that the .gguf file `name` was converted to; the first time, where `convert`, convert it.

    Raises InputError where there is no such file, the `gguf` package is missing, or the file holds a model or a
    tokenizer that cannot be converted faithfully.
    """
    path = expanded(name)
    try:
        stat = path.stat()
    except OSError:
        remedy = "check the spelling" + (", or fetch it: make smollm" if path.name == SMOLLM else "")
        raise InputError(f"there is no file {name} here (looked for {path.absolute()}): {remedy}") from None
    target = cache() / f"{path.stem}-{_digest(path.absolute(), stat.st_size, stat.st_mtime_ns)[:16]}-{_FORM}"
    if (target / "config.json").is_file():
        return target
    if not convert:
        raise InputError(f"{name} was not converted yet, and this command converts nothing")
    write(path, target)
    return target


@functools.lru_cache(maxsize=4)  # a run asks for its model's folder many times
def _digest(path: Path, size: int, changed: int) -> str:
    with refusal(path):
        return sha256_file(path)


def cache() -> Path:
    """Return the folder of converted models, beside the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "fast_ft-gguf"


def write(path: Path, target: Path) -> None:
    """Write the model of a .gguf file to the folder `target`, whole or not at all. InputError as `folder` raises it."""
    source = Metadata.open(path, _REMEDY)
    config = config_of(source)
    names = {tensor.name: _name(source, tensor.name) for tensor in source.tensors}
    with refusal(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target.parent, sum(2 * int(tensor.n_elements) for tensor in source.tensors), f"{path.name} as float16")
    note(f"note: {path} is converted once, to {target}")
    with replace_folder(target) as fresh:
        gguf_tokenizer.write(source, fresh)
        _write_weights(source, config, names, fresh)
        ids = {f"{kind}_token_id": config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")}
        write_json(fresh / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        write_json(fresh / "config.json", config)


def config_of(source: Metadata) -> dict[str, Any]:
    """Return config.json's content. InputError for a model of another kind, or with a rope that it cannot say."""
    kind = source.architecture
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"{source.path}: its architecture is {kind!r}; .gguf files of {', '.join(_ARCHITECTURES)} are read. "
            f"{_REMEDY}"
        )
    tensors = {tensor.name for tensor in source.tensors}
    scaling = source.text(f"{kind}.rope.scaling.type")
    if "rope_freqs.weight" in tensors or scaling not in (None, "none"):
        raise InputError(f"{source.path}: it scales its rotary positions, which is not read from it. {_REMEDY}")
    if source.number(f"{kind}.expert_count"):
        raise InputError(f"{source.path}: it is a mixture of experts, which is not supported. {_REMEDY}")
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu"}
    config |= {key: int(source.needed(f"{kind}.{name}")) for key, name in _SIZES.items()}
    heads = config["num_attention_heads"]
    tokens = gguf_tokenizer.special_tokens(source)
    return config | {
        "num_key_value_heads": int(source.number(f"{kind}.attention.head_count_kv") or heads),
        "head_dim": int(source.number(f"{kind}.attention.key_length") or config["hidden_size"] // heads),
        "rms_norm_eps": float(f"{source.needed(f'{kind}.attention.layer_norm_rms_epsilon'):.6g}"),  # stored in fp32
        "rope_theta": float(source.number(f"{kind}.rope.freq_base") or 10_000.0),
        "vocab_size": int(next(t.shape[1] for t in source.tensors if t.name == "token_embd.weight")),
        "tie_word_embeddings": "output.weight" not in tensors,
        **({"attention_bias": "blk.0.attn_q.bias" in tensors} if kind == "llama" else {}),
        "torch_dtype": "float16",
        **{f"{name}_token_id": tokens[name] for name in ("bos", "eos", "pad")},
    }


def _name(source: Metadata, name: str) -> str:
    """Return a tensor's name in transformers' layout."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in TENSORS:
        raise InputError(f"{source.path}: it holds a tensor {name!r}, which no Llama-like model has. {_REMEDY}")
    block, inner, end = found.groups()
    return f"{f'model.layers.{block}.' if block else ''}{TENSORS[inner]}.{end}"


def _write_weights(source: Metadata, config: dict[str, Any], names: dict[str, str], folder: Path) -> None:
    """Write model.safetensors, or parts of it with an index; one part is in memory at a time."""
    from safetensors.numpy import save_file

    parts: list[list[Any]] = [[]]
    size = 0
    for tensor in source.tensors:
        size += 2 * int(tensor.n_elements)
        if size > _SHARD and parts[-1]:
            parts.append([])
            size = 2 * int(tensor.n_elements)
        parts[-1].append(tensor)
    files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = ["model.safetensors"]
    else:
        where = {names[tensor.name]: file for file, part in zip(files, parts, strict=True) for tensor in part}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    for file, part in zip(files, parts, strict=True):
        with refusal(folder / file):
            save_file(dict(_arrays(source, config, names, part)), folder / file, metadata={"format": "pt"})


def _arrays(
    source: Metadata, config: dict[str, Any], names: dict[str, str], tensors: list[Any]
) -> Iterator[tuple[str, numpy.ndarray]]:
    """Yield (name, weights in float16); weights of q and k in the order in which transformers turns them."""
    import numpy as np

    for tensor in tensors:
        values = source.values(tensor)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
        if heads and config["model_type"] == "llama":  # llama.cpp turns neighbours, transformers both halves of a head
            grouped = values.reshape(config[heads], -1, 2, *values.shape[1:])
            values = grouped.swapaxes(1, 2).reshape(values.shape)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise InputError(f"{source.path}: {tensor.name} holds numbers that float16 cannot hold. {_REMEDY}")
        yield names[tensor.name], np.ascontiguousarray(half)
