"""A base model's sizes, and what follows from them: linear layers, numbers of weights, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped

GIB = 2**30
#: The linear layers of one of Llama's blocks, in the order of `ModelShape.linear_shapes`.
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
#: The same layers as PEFT's target_modules names them.
TARGET_MODULES = tuple(name.split(".")[1] for name in LINEARS)
#: What transformers takes where a family's config.json does not name it.
_DEFAULTS = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes as transformers' LlamaConfig names them.

    `own_linears`: (in, out) of each linear layer of all blocks, where these are not Llama's; see
    models/base_layers.counted. Empty: Llama's. `unquantised_weights`: of these layers, that a quantised base leaves
    whole. `number_bytes`: of each number that the model computes with, 2 or 4.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    own_linears: tuple[tuple[int, int], ...] = ()
    unquantised_weights: int = 0
    number_bytes: int = 2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Return the sizes in config.json's content. Raises InputError for a missing key."""
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        kind = str(config.get("model_type", "llama"))
        if missing := [key for key in needed if not isinstance(config.get(key), int) or config[key] < 1]:
            raise InputError(
                f"the base model's config.json (model_type {escaped(kind)!r}) has no {', '.join(missing)}: models that "
                "name their sizes as Llama does are supported."
            )
        given = _DEFAULTS.get(kind, {}) | config
        heads = given["num_attention_heads"]
        return cls(
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            vocab_size=given["vocab_size"],
            tied=bool(given.get("tie_word_embeddings")),
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one block, in the order of LINEARS."""
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]

    @cached_property
    def linear_weights(self) -> int:
        """Number of weights in all blocks' linear layers."""
        return sum(a * b for a, b in self._linears)

    @property
    def quantised_weights(self) -> int:
        """Number of those weights that have 4 bits in a 4-bit base."""
        return self.linear_weights - self.unquantised_weights

    def lora_weights(self, r: int) -> int:
        """Return the number of weights of a LoRA of rank `r` on all linear layers."""
        return r * self._linear_ends

    @cached_property
    def linear_sides(self) -> tuple[float, float]:
        """Inputs and outputs of a block's linear layers, added up; in the mean over the blocks."""
        inside, outside = (sum(sides) / self.num_hidden_layers for sides in zip(*self._linears, strict=True))
        return inside, outside

    @cached_property
    def _linear_ends(self) -> int:
        return sum(a + b for a, b in self._linears)

    @cached_property
    def _linears(self) -> Sequence[tuple[int, int]]:
        return self.own_linears or self.linear_shapes * self.num_hidden_layers

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values as the model computes them, over all layers."""
        return 2 * self.number_bytes * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def weights_gib(self, *, load_in_4bit: bool) -> float:
        """Return the base's GiB: doubly quantised NF4 takes 0.516 bytes a weight; embeddings and head stay whole."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2) * self.number_bytes
        in_4_bits = self.quantised_weights if load_in_4bit else 0
        return (in_4_bits * 0.516 + (self.linear_weights - in_4_bits) * self.number_bytes + embeddings) / GIB
