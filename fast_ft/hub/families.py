"""What a model's config.json says: its dimensions, and whether it is of a family that training and decoding know.

Every other room asks this module, or `hub.download.model_config`, for what a config.json holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

GIB = 2**30
#: Values of model_type that training and decoding know: plain attention, a gated MLP, logits straight from the head.
KNOWN = ("llama", "mistral", "qwen2")
#: The linear layers of one of their blocks, in the order of `ModelShape.linear_shapes`.
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
#: The same layers as PEFT's target_modules names them.
TARGET_MODULES = tuple(name.split(".")[1] for name in LINEARS)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json's content. Raises InputError where it is missing, garbled or far too large."""
    return untrusted_files.json_object(folder / "config.json", remedy="Copy or download the model again.")


def end_token_ids(folder: Path) -> list[int]:
    """Return the ids that end an answer by generation_config.json, or by config.json where that says nothing."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            given = untrusted_files.json_object(folder / name).get("eos_token_id")
            ids = given if isinstance(given, list) else [given]
            if found := [each for each in ids if isinstance(each, int) and not isinstance(each, bool)]:
                return found
    return []


def context_length(name_or_path: str) -> int | None:
    """Return the most tokens that a model can attend to, as far as its folder's config.json or its name tells."""
    try:
        length = read_config(Path(name_or_path).expanduser()).get("max_position_embeddings")
    except (InputError, OSError, RuntimeError):  # RuntimeError: ~name of an unknown user
        length = 4096 if re.search(r"llama-?2(?![.\d])", name_or_path, re.IGNORECASE) else None
    return length if isinstance(length, int) else None


@dataclass(frozen=True)
class ModelShape:
    """Sizes as transformers' LlamaConfig names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Return the sizes in config.json's content. Raises InputError for a missing key or another kind of model."""
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        kind = config.get("model_type", "llama")
        if missing := [key for key in needed if not isinstance(config.get(key), int)]:
            raise InputError(
                f"the base model's config.json (model_type {kind!r}) has no {', '.join(missing)}: "
                "only Llama-like models are supported."
            )
        if kind not in KNOWN:
            raise InputError(f"the base model's model_type is {kind!r}; supported are {', '.join(KNOWN)}.")
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one block, in the order of LINEARS."""
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]

    @property
    def linear_weights(self) -> int:
        """Number of weights in all blocks' linear layers, which 4-bit quantisation covers."""
        return self.num_hidden_layers * sum(a * b for a, b in self.linear_shapes)

    def lora_weights(self, r: int) -> int:
        """Return the number of weights of a LoRA of rank `r` on all linear layers."""
        return self.num_hidden_layers * r * sum(a + b for a, b in self.linear_shapes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's 16-bit keys and values, over all layers."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def weights_gib(self, *, load_in_4bit: bool) -> float:
        """Return the base's GiB: doubly quantised NF4 takes 0.516 bytes a weight; embeddings and head keep 16 bits."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2) * 2
        return (self.linear_weights * (0.516 if load_in_4bit else 2) + embeddings) / GIB
