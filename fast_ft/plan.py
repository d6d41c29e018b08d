"""How a run's work is cut: rows in a forward pass, prompts in a decoding batch, and the memory that takes.

Pure arithmetic on the model's shape and the rows' token counts; no torch. What is settled here is written to
plan.json and obeyed when the run is resumed. The effective batch, the order of rows and the loss stay the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fast_ft.errors import InputError
from fast_ft.plan_pool import settle_pool, slots_without_card

GIB = 2**30
LAUNCH_SECONDS = 0.2  #: Python's time to launch a 7B's forward and backward (H200 host: 0.20 eager, 0.07 captured)
_REACHED = 0.6  #: share of a card's matmul rate that training reaches
_CONTEXT_GIB = 0.45  #: the CUDA context and library handles, outside torch's allocator (measured 0.4 to 0.5)
_SLACK = 0.92  #: of the memory may be planned for; the rest is fragmentation


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a Llama-like model, from its config.json."""

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
        """Read config.json's content; keys as in transformers' LlamaConfig. InputError where one is missing."""
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if missing := [key for key in needed if not isinstance(config.get(key), int)]:
            raise InputError(
                f"the base model's config.json (model_type {config.get('model_type')!r}) has no {', '.join(missing)}: "
                "only Llama-like models are supported."
            )
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
        """(in, out) of the seven linear layers of one block."""
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]

    @property
    def linear_weights(self) -> int:
        """Weights in all blocks' linear layers: what 4-bit quantisation covers."""
        return self.num_hidden_layers * sum(a * b for a, b in self.linear_shapes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of 16-bit KV cache for one token."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Plan:
    """What was settled. GiB are predicted peaks, CUDA context included; 0 on a CPU, where nothing is predicted.

    A micro-batch has at most `micro_batch` rows and, padding included, `most_tokens` tokens (None: no limit).
    `checkpointing`: activations are computed again. `capture`: passes are replayed from CUDA graphs.
    `generation_batch` answers are decoded side by side, over a KV cache of `cache_tokens` (None: enough for all);
    `dequantise`: from weights turned to 16 bits, since there is memory for them.
    """

    micro_batch: int
    most_tokens: int | None = None
    checkpointing: bool = False
    capture: bool = False
    generation_batch: int = 1
    memory_gib: float = 0.0
    train_gib: float = 0.0
    generate_gib: float = 0.0
    cache_tokens: int | None = None
    dequantise: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weights_gib(shape: ModelShape, *, load_in_4bit: bool) -> float:
    """Memory of the base: NF4 with double quantisation is 0.516 bytes a weight; embeddings and head stay 16-bit."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) * 2
    return (shape.linear_weights * (0.516 if load_in_4bit else 2) + embeddings) / GIB


def lora_gib(shape: ModelShape, r: int, optim: str) -> float:
    """Memory of a LoRA on all linear layers: fp32 weights and gradients, and AdamW's two states."""
    weights = shape.num_hidden_layers * r * sum(a + b for a, b in shape.linear_shapes)
    return weights * (4 + 4 + (2 if optim == "adamw_8bit" else 8)) / GIB


def activations_gib(shape: ModelShape, tokens: int, *, checkpointing: bool, fused_kernels: bool) -> float:
    """Memory of one micro-batch of so many tokens, padding included, in 16-bit.

    With checkpointing each layer keeps its input (2 bytes a value) and one layer at a time is computed again. What a
    layer keeps was measured on a 7B: 3.8 MiB a token in all layers with Unsloth's kernels, 5.9 without. The loss
    holds the logits of 1,024 positions, in 16 and 32 bits.
    """
    h, m = shape.hidden_size, shape.intermediate_size
    one_layer = 2 * (7 * h + 3 * m) if fused_kernels else 2 * (10 * h + 5 * m)
    layers = shape.num_hidden_layers
    kept = layers * 2 * h + one_layer if checkpointing else layers * one_layer
    return (tokens * kept + min(tokens, 1024) * shape.vocab_size * 8) / GIB


def train_flops(shape: ModelShape, tokens: int) -> float:
    """Arithmetic of a forward and backward pass without recomputation: the base is frozen, so 4 a weight and token."""
    return tokens * 4.0 * (shape.linear_weights + shape.vocab_size * shape.hidden_size)


def settle(
    shape: ModelShape,
    row_tokens: Sequence[int],
    prompt_tokens: Sequence[int],
    *,
    effective_batch_size: int,
    wanted_micro_batch: int | None,
    wanted_generation_batch: int | None,
    max_new_tokens: int,
    candidates: int = 1,
    r: int,
    optim: str,
    load_in_4bit: bool,
    wanted_checkpointing: bool | None,
    fused_kernels: bool,
    memory_gib: float | None,
    tflops: float | None,
) -> Plan:
    """Return the plan. What the recipe fixes (`wanted_...`) stays as it is.

    `memory_gib` None is a CPU; `tflops` is the card's measured rate of a large 16-bit matrix product, None where
    nothing is to be captured. Activations are kept where the longest row's fit. A pass is captured where Python's
    launches would take longer than its arithmetic: on a large card, with activations kept.
    """
    longest = max(row_tokens, default=1)
    fixed = weights_gib(shape, load_in_4bit=load_in_4bit) + _CONTEXT_GIB
    budget = math.inf if memory_gib is None else memory_gib * _SLACK

    def tokens_gib(tokens: int, checkpointing: bool) -> float:
        act = activations_gib(shape, tokens, checkpointing=checkpointing, fused_kernels=fused_kernels)
        return fixed + lora_gib(shape, r, optim) + act

    keeps = tokens_gib(_padded(longest), checkpointing=False) <= budget
    checkpointing = not keeps if wanted_checkpointing is None else wanted_checkpointing

    def train_gib(rows: int) -> float:
        return tokens_gib(rows * _padded(longest), checkpointing)

    capture = False
    if tflops is not None and not checkpointing:
        seconds = train_flops(shape, min(2048, effective_batch_size * longest)) / (tflops * 1e12 * _REACHED)
        capture = seconds < LAUNCH_SECONDS
    if wanted_micro_batch is not None:
        micro, most_tokens = wanted_micro_batch, None
    elif memory_gib is None:
        micro, most_tokens = effective_batch_size, None
    elif capture:
        # A fixed number of rows keeps the shapes few. Half of the batch at most: sorted by length, two halves are
        # padded less than one whole, and a graph of 2,000 tokens is no longer bound by launches.
        micro, most_tokens = _most(train_gib, max(1, effective_batch_size // 2), budget), None
    else:
        micro = effective_batch_size
        most_tokens = _most(lambda n: tokens_gib(64 * n, checkpointing), micro * _padded(longest) // 64, budget) * 64
    if memory_gib is None:
        slots = wanted_generation_batch or slots_without_card(prompt_tokens, candidates)
        return Plan(micro, most_tokens, checkpointing, capture, slots)
    slots, cache_tokens, dequantise, generate_gib = settle_pool(
        shape,
        prompt_tokens,
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        wanted_slots=wanted_generation_batch,
        load_in_4bit=load_in_4bit,
        fixed_gib=fixed,
        budget_gib=budget,
    )
    peak = train_gib(micro) if most_tokens is None else tokens_gib(max(most_tokens, _padded(longest)), checkpointing)
    return Plan(
        micro, most_tokens, checkpointing, capture, slots, memory_gib, round(peak, 2), round(generate_gib, 2),
        cache_tokens, dequantise,
    )  # fmt: skip


def _padded(tokens: int) -> int:
    """A length rounded up as passes.py rounds it for graphs."""
    return math.ceil(tokens / 64) * 64


def _most(gib: Any, limit: int, budget: float) -> int:
    """The largest count up to `limit` whose memory fits; 1 where none does, for the run itself will say so."""
    return next((rows for rows in range(limit, 0, -1) if gib(rows) <= budget), 1)
