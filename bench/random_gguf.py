"""A Llama of a given shape as Q4_K_M, with random blocks: for llama.cpp's speed, which does not depend on values.

Which tensors are in Q6_K is llama.cpp's own choice for Q4_K_M (src/llama-quant.cpp): the head, and in the first and
last eighth of the layers and in every third between them the value and down projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fast_ft.hub import gguf_metadata

BLOCK = 256  #: numbers of a K block
Q4_K, Q6_K = 144, 210  #: bytes of one
_SEED_BYTES = 1 << 24


def write(path: Path, config: dict[str, Any]) -> None:
    """Write the model that a Llama's config.json describes. Sizes must be multiples of 256."""
    gguf = gguf_metadata.library("a model for llama.cpp")
    writer = gguf.GGUFWriter(str(path), "llama")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer.add_context_length(config.get("max_position_embeddings", 4096))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    _add_vocabulary(writer, gguf, config["vocab_size"])
    for name, rows, columns, kind in tensors(config, kv_heads):
        _add_tensor(writer, gguf, name, rows, columns, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: dict[str, Any], kv_heads: int) -> Iterator[tuple[str, int, int, str]]:
    """Yield each tensor's name, rows, columns and type: F32, Q4_K or Q6_K."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = hidden // config["num_attention_heads"] * kv_heads
    yield "token_embd.weight", config["vocab_size"], hidden, "Q4_K"
    for layer in range(layers):
        prefix, wide = f"blk.{layer}.", "Q6_K" if more_bits(layer, layers) else "Q4_K"
        yield f"{prefix}attn_norm.weight", 1, hidden, "F32"
        yield f"{prefix}attn_q.weight", hidden, hidden, "Q4_K"
        yield f"{prefix}attn_k.weight", keys, hidden, "Q4_K"
        yield f"{prefix}attn_v.weight", keys, hidden, wide
        yield f"{prefix}attn_output.weight", hidden, hidden, "Q4_K"
        yield f"{prefix}ffn_norm.weight", 1, hidden, "F32"
        yield f"{prefix}ffn_gate.weight", inner, hidden, "Q4_K"
        yield f"{prefix}ffn_up.weight", inner, hidden, "Q4_K"
        yield f"{prefix}ffn_down.weight", hidden, inner, wide
    yield "output_norm.weight", 1, hidden, "F32"
    yield "output.weight", config["vocab_size"], hidden, "Q6_K"


def more_bits(layer: int, layers: int) -> bool:
    """Return whether Q4_K_M stores a layer's value and down projections in Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _add_tensor(writer: Any, gguf: Any, name: str, rows: int, columns: int, kind: str) -> None:
    import numpy as np

    if kind == "F32":
        writer.add_tensor(name, np.ones(columns, dtype=np.float32))
        return
    size = {"Q4_K": Q4_K, "Q6_K": Q6_K}[kind]
    blocks = rows * columns // BLOCK
    draw = np.random.default_rng(0).integers(0, 256, (_SEED_BYTES // size, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-4).tobytes(), dtype=np.uint8)
    if kind == "Q4_K":  # two scales of the block come first
        draw[:, 0:2] = draw[:, 2:4] = scale
    else:  # one comes last
        draw[:, -2:] = scale
    data = np.tile(draw, (-(-blocks // len(draw)), 1))[:blocks].reshape(rows, columns // BLOCK * size)
    writer.add_tensor(name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))


def _add_vocabulary(writer: Any, gguf: Any, size: int) -> None:
    """Add a sentencepiece vocabulary of names: the control tokens, every byte, and made-up words."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{index}" for index in range(len(words), size)]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
