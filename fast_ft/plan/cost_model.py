"""What a training pass costs: memory and time of one micro-batch, forward and backward. Pure arithmetic.

A pass of T tokens over the frozen base does 4 operations for each weight and token, and 2 more where a layer's
activations are computed again; the base needs no weight gradients. It turns the 4-bit weights to 16 bits once forward
and once backward. Constants were fitted on an H200 with a 7B (docs/performance.md); what else they say is a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast_ft.hub.families import GIB, ModelShape

CONTEXT_GIB = 0.73  #: the CUDA context, libraries and loaded kernels, outside torch's allocator (H200)
#: Python's time to launch a 32-layer model's forward and backward kernels, by backend (measured on an H200's host).
LAUNCH_SECONDS = {"fused": 0.17, "unsloth": 0.17, "peft": 0.2}
STEP_SECONDS = 0.05  #: optimizer, clipping and log of one step
CAPTURE_SECONDS = 0.3  #: to capture the graph of one width
_KERNEL_SECONDS = 1.4e-4  #: of a layer's small kernels, forward and backward: what tokens do not explain
_PASSED_OVER = 88  #: how often a layer's small kernels read or write as much as a token's hidden state, both ways
_LORA_RATE = 0.15  #: of a large product's rate is what LoRA's thin ones reach
_ATTENTION_TOKENS = 150  #: that a row costs beside its own
_GRAPH_GIB = 0.55  #: more with graphs: their memory is a pool of its own, and 0.08 of the context
_HOLES = 38  #: hidden states a token that lie idle between others: what the allocator reserves and has no use for
#: What a layer keeps of a token, in 16 bits, in multiples of the hidden size and of the MLP's inner size.
_KEPT = {"fused": (6.1, 2), "unsloth": (5.8, 3), "peft": (8.8, 5)}


@dataclass(frozen=True)
class Rates:
    """What a card reaches in training: TFLOP/s in 16-bit products, GB/s of its memory.

    `attention` is the share of `tflops` that torch's memory-efficient attention reaches, each row counted as if it were
    _ATTENTION_TOKENS longer.
    """

    tflops: float
    gb_per_s: float
    attention: float = 1.0


@dataclass(frozen=True)
class Training:
    """What the recipe says of training that costs memory or time."""

    r: int
    optim: str
    load_in_4bit: bool
    backend: str  #: as models/loaders/choose.py names them: they keep different activations
    rows: int  #: in an effective batch
    longest: int  #: row, in tokens
    typical: int  #: row that a token finds itself in, in tokens
    draws: bool = False  #: dropout: a layer that is computed again must then draw the same, which a graph cannot


def fixed_gib(shape: ModelShape, training: Training) -> float:
    """Memory that any pass finds taken: context, base, LoRA in fp32 with its gradients and AdamW's two states.

    Beside them the largest weight in 16 bits, of gate and up side by side, and LoRA's matrices, which are cast.
    """
    states = 2 if training.optim == "adamw_8bit" else 8
    lora = shape.lora_weights(training.r) * (4 + 4 + states + 2)
    weight = 4 * shape.hidden_size * shape.intermediate_size if training.load_in_4bit else 0
    return CONTEXT_GIB + shape.weights_gib(load_in_4bit=training.load_in_4bit) + (lora + weight) / GIB


def pass_gib(
    shape: ModelShape, training: Training, tokens: int, recompute_layers: int, *, capture: bool = False
) -> float:
    """Memory of a pass over `tokens` tokens in 16 bits, at its peak.

    A layer keeps 0.09 MiB a token in a 7B with our blocks, 0.12 with Unsloth's kernels, 0.18 without (measured); one
    that is computed again keeps its input. The peak is at the end of the forward pass, beside the loss's logits of
    1,024 positions, or where the last of the recomputed layers goes backward.
    """
    h, m, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    of_h, of_m = _KEPT[training.backend]
    layer = 2 * (of_h * h + of_m * m)
    inputs = recompute_layers * 2 * h
    loss = min(tokens, 1024) * shape.vocab_size * 6 + tokens * 4 * h
    around = tokens * _HOLES * 2 * h + (_GRAPH_GIB * GIB if capture else 0)
    attention = (training.rows + 1) * shape.num_attention_heads * min(tokens, training.longest) * shape.head_dim * 4
    forward = tokens * (inputs + (layers - recompute_layers) * layer) + loss
    backward = tokens * (inputs + layer) + tokens * 4 * h + attention if recompute_layers else 0
    return (max(forward, backward) + around) / GIB


def train_flops(shape: ModelShape, tokens: int) -> float:
    """Arithmetic of a forward and backward pass without recomputation: the base is frozen, so 4 a weight and token."""
    return tokens * 4.0 * (shape.linear_weights + shape.vocab_size * shape.hidden_size)


def pass_seconds(
    shape: ModelShape, training: Training, rates: Rates, tokens: int, recompute_layers: int, *, capture: bool
) -> float:
    """Seconds of a pass over `tokens` tokens, filling included: what the card takes, or Python's launches if longer."""
    layers, again = shape.num_hidden_layers, recompute_layers / shape.num_hidden_layers
    flops = train_flops(shape, tokens) + again * 1.8 * tokens * shape.linear_weights  # forward alone runs faster
    attended = 2.0 * tokens * (training.typical + _ATTENTION_TOKENS) * shape.hidden_size * layers
    flops += attended * (3.5 + again) / rates.attention
    flops += tokens * shape.lora_weights(training.r) * (6.0 + 2.0 * again) / _LORA_RATE
    unpacked = (2 + again) * shape.linear_weights * 3.1 if training.load_in_4bit else 0.0
    passed = tokens * layers * _PASSED_OVER * 2.0 * shape.hidden_size * (1 + 0.4 * again)
    card = flops / (rates.tflops * 1e12) + (unpacked + passed) / (rates.gb_per_s * 1e9)
    card += layers * _KERNEL_SECONDS * (1 + again)
    launch = LAUNCH_SECONDS[training.backend] * (layers / 32) * (1 + 0.75 * again)  # torch's checkpoint is slow, too
    return card if capture else max(card, launch)
