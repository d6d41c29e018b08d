"""A merged model, or an adapter alone, as a GGUF file for llama.cpp and what is built on it.

Names and numbers of the format are the gguf package's (llama.cpp, gguf-py); keys and tensor layouts follow its
documentation, docs/gguf.md in ggml's repository. Tensors are written one at a time.

In the architecture "llama", llama.cpp rotates neighbouring numbers of a head, (0, 1), (2, 3), ..., where transformers
rotates (0, D/2), (1, D/2 + 1), .... So the rows of q and k stand in another order there; `neighbours` puts them so.

Shapes: O outputs, I inputs, R rank, D numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.export.gguf_vocabulary import Vocabulary, read_vocabulary
from fast_ft.export.merged import AdapterWeights, BaseWeights
from fast_ft.hub import gguf_metadata
from fast_ft.hub.families import ModelShape, read_config

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from torch import Tensor

#: model_type -> llama.cpp's name of the architecture, and whether it wants `neighbours`.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
#: What a GGUF's matrices are written as here; vectors are float32.
OUTTYPES = ("f16", "q8_0")
_BLOCK = 32  #: numbers of a row that q8_0 gives one scale


@dataclass(frozen=True)
class Shape:
    """What of a config.json goes into a GGUF."""

    architecture: str
    neighbours: bool
    config: dict[str, Any]
    sizes: ModelShape
    rope: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Read config.json. Raises InputError for a model that llama.cpp would compute otherwise."""
        config = read_config(folder)
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise InputError(
                f"{folder}: a model of type {kind!r} is not written as GGUF here; {', '.join(ARCHITECTURES)} are. Use "
                "llama.cpp's own convert_hf_to_gguf.py on the merged model."
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
        if (form := rope.get("rope_type", rope.get("type", "default"))) not in ("default", "linear", "llama3"):
            raise InputError(
                f"{folder}: rope of type {form!r} is not written as GGUF here; default, linear, llama3 are."
            )
        return cls(*ARCHITECTURES[kind], config, ModelShape.from_config(config), rope | {"rope_type": form})

    def reordered(self, name: str, rows: Tensor) -> Tensor:
        """Return rows (O, ...) of the tensor `name` in llama.cpp's order."""
        for layer, heads in (("q_proj", self.sizes.num_attention_heads), ("k_proj", self.sizes.num_key_value_heads)):
            if self.neighbours and f".{layer}." in name:
                return neighbours(rows, heads)
        return rows


def neighbours(rows_O: Tensor, heads: int) -> Tensor:
    """Return rows (O, ...), O being heads x D, with row i + D/2 of each head right behind its row i."""
    parts = rows_O.reshape(heads, 2, len(rows_O) // heads // 2, *rows_O.shape[1:])
    return parts.transpose(1, 2).reshape(rows_O.shape)


def write_model(merged: Path, out: Path, outtype: str) -> list[str]:
    """Write the merged model in a folder as one GGUF file; return sentences that its user should know.

    Raises:
        InputError: gguf is not installed, or the model is of a kind that is not written here.
    """
    library = gguf_metadata.library("a GGUF file")
    shape, weights, words = Shape.read(merged), BaseWeights(merged), read_vocabulary(merged)
    with atomic_files.replace_file(out) as path:
        writer = library.GGUFWriter(str(path), shape.architecture)
        _describe(library, writer, shape, words, outtype, merged.name)
        names = library.get_tensor_name_map(
            library.MODEL_ARCH[shape.architecture.upper()], shape.sizes.num_hidden_layers
        )
        makers: list[Callable[[], np.ndarray]] = []
        if shape.rope["rope_type"] == "llama3":
            factors = _llama3_factors(shape.rope, shape.sizes.head_dim)
            _announce(library, writer, "rope_freqs.weight", factors.shape, "f32")
            makers.append(lambda: factors)
        for name in weights.names():
            size = weights.shape(name)
            kind = "f32" if len(size) == 1 else outtype if outtype != "q8_0" or size[-1] % _BLOCK == 0 else "f16"
            _announce(library, writer, _renamed(names, name), size, kind)
            makers.append(partial(_values, library, shape, weights, name, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for make in makers:
            writer.write_tensor_data(make())
        writer.close()
    return words.notes


def write_adapter(adapter: Path, base: Path, out: Path) -> None:
    """Write a LoRA adapter alone as GGUF, for llama.cpp's --lora. Raises InputError for one with other tensors."""
    library = gguf_metadata.library("a GGUF file")
    shape, lora = Shape.read(base), AdapterWeights(adapter)
    if odd := [name for name in lora.tensors if ".lora_A." not in name and ".lora_B." not in name]:
        raise InputError(f"{adapter}: {odd[0]} is no matrix of LoRA, which is all that llama.cpp's adapters hold.")
    names = library.get_tensor_name_map(library.MODEL_ARCH[shape.architecture.upper()], shape.sizes.num_hidden_layers)
    with atomic_files.replace_file(out) as path:
        writer = library.GGUFWriter(str(path), shape.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.scale * lora.config["r"])  # llama.cpp divides it by the rank
        for name, tensor in sorted(lora.tensors.items()):
            module, side = name.rsplit(".lora_", 1)
            rows = shape.reordered(name, tensor.float()) if side.startswith("B") else tensor.float()
            label = f"{_renamed(names, f'{module}.weight')}.lora_{side[0].lower()}"
            writer.add_tensor(label, rows.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _describe(library: Any, writer: gguf.GGUFWriter, shape: Shape, words: Vocabulary, outtype: str, name: str) -> None:
    """Add the keys that say what the model is and how its text is split."""
    config = shape.config
    writer.add_name(name)
    writer.add_file_type(library.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.sizes.hidden_size)
    writer.add_block_count(shape.sizes.num_hidden_layers)
    writer.add_feed_forward_length(shape.sizes.intermediate_size)
    writer.add_head_count(shape.sizes.num_attention_heads)
    writer.add_head_count_kv(shape.sizes.num_key_value_heads)
    writer.add_key_length(shape.sizes.head_dim)
    writer.add_value_length(shape.sizes.head_dim)
    writer.add_rope_dimension_count(shape.sizes.head_dim)
    writer.add_rope_freq_base(float(shape.rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(shape.sizes.vocab_size)
    if shape.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))
    words.add_to(library, writer, shape.sizes.vocab_size)


def _announce(library: Any, writer: gguf.GGUFWriter, name: str, size: tuple[int, ...], kind: str) -> None:
    """Give the writer a tensor's name, shape and type; its values come later."""
    import numpy as np

    if kind == "q8_0":
        quantised = library.GGMLQuantizationType.Q8_0
        stored = library.quants.quant_shape_to_byte_shape(size, quantised)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), quantised)
        return
    dtype = np.dtype(np.float32 if kind == "f32" else np.float16)
    writer.add_tensor_info(name, size, dtype, math.prod(size) * dtype.itemsize)


def _values(library: Any, shape: Shape, weights: BaseWeights, name: str, kind: str) -> np.ndarray:
    import numpy as np

    values = shape.reordered(name, weights.get(name, "cpu").float()).contiguous().numpy()
    if kind == "q8_0":
        return library.quants.quantize(values, library.GGMLQuantizationType.Q8_0)
    return values if kind == "f32" else values.astype(np.float16)


def _renamed(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(f"the tensor {name} has no name in GGUF: this model is not one that llama.cpp knows.")
    return found


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return what llama.cpp divides each frequency by, float32 (D/2,): Llama 3's rope (Meta's llama-models)."""
    import numpy as np

    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)  # turns within the former context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)
