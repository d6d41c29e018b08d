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
STEP_SECONDS = 0.03  #: optimizer, clipping and log of one step
CAPTURE_SECONDS = 0.3  #: to capture the graph of one width
UNPACK_BYTES = 3.1  #: of memory traffic take as long as turning one 4-bit weight to 16 bits
LOSS_POSITIONS = 1024  #: whose logits exist at a time (train/loss.py)
_KERNEL_SECONDS = 2.6e-4  #: of a layer's small kernels, forward and backward: what tokens do not explain
_PASSED_OVER = 95  #: how often a layer's small kernels read or write as much as a token's hidden state, both ways
_ATTENTION_TOKENS = 160  #: that a row costs beside its own
#: GiB that the allocator reserves whatever a pass holds, kernel by kernel and from graphs: cuBLAS's workspaces, blocks
#: of other sizes. With graphs it is more, since their memory is a pool of its own; 0.08 of it are of the context.
_RESERVED_GIB = {False: 0.41, True: 0.69}
_HOLES = 32  #: hidden states a token that lie idle between others: what the allocator reserves and has no use for
#: What a layer keeps of a token, in 16 bits, in multiples of the hidden size, q's width, k's width, the MLP's inner
#: size and the LoRA's rank. A 7B's hidden size, q's and k's widths are one number; only their sum was measured.
_KEPT = {"fused": (2, 2, 2, 2, 7), "unsloth": (1.8, 2, 2, 3, 0), "peft": (4.8, 2, 2, 5, 0)}


@dataclass(frozen=True)
class Rates:
    """What a card and its host reach in training.

    `tflops`: TFLOP/s in 16-bit products. `gb_per_s`: of its memory. `attention`: TFLOP/s in torch's memory-efficient
    attention, each row counted as if it were _ATTENTION_TOKENS longer; None: those of products. `launch`: the host's
    time to launch a kernel, over that of the H200's host.
    """

    tflops: float
    gb_per_s: float
    attention: float | None = None
    launch: float = 1.0


@dataclass(frozen=True)
class Training:
    """What the recipe says of training that costs memory or time."""

    r: int
    optim: str
    load_in_4bit: bool
    backend: str  #: as models/loaders/choose.py names them: they keep different activations
    rows: int  #: in an effective batch
    longest: int  #: row, in tokens
    draws: bool = False  #: dropout: a layer that is computed again must then draw the same, which a graph cannot
    unpack_bytes: float = UNPACK_BYTES


def fixed_gib(shape: ModelShape, training: Training) -> float:
    """Memory that any pass finds taken: context, base, LoRA in fp32 with its gradients and AdamW's two states.

    Beside them the largest weight in 16 bits, of gate and up side by side, and LoRA's matrices, which are cast; one
    layer's are there twice more, with their gradients, while it computes.
    """
    states = 2 if training.optim == "adamw_8bit" else 8
    lora = shape.lora_weights(training.r) * (4 + 4 + states + 2 + 10 / shape.num_hidden_layers)
    weight = 4 * shape.hidden_size * shape.intermediate_size if training.load_in_4bit else 0
    return CONTEXT_GIB + shape.weights_gib(load_in_4bit=training.load_in_4bit) + (lora + weight) / GIB


def pass_gib(
    shape: ModelShape, training: Training, tokens: int, recompute_layers: int, *, capture: bool = False,
    loss_positions: int = LOSS_POSITIONS, offloaded: bool = False,
) -> float:  # fmt: skip
    """Memory of a pass over `tokens` tokens in 16 bits, at its peak.

    A layer keeps 0.09 MiB a token in a 7B with our blocks, 0.12 with Unsloth's kernels, 0.18 without (measured); one
    that is computed again keeps its input, on the card unless that is `offloaded`. The peak is where the forward pass
    ends, beside the loss's logits of `loss_positions`; where the last layer goes backward, beside what attention's
    backward pass takes for the longest row; or where the last of the recomputed layers goes backward.
    """
    h, m, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    layer = kept_bytes(shape, training)
    inputs = 0 if offloaded else recompute_layers * 2 * h
    loss = min(tokens, loss_positions) * shape.vocab_size * 6 + tokens * 4 * h
    attention = (training.rows + 1) * shape.num_attention_heads * min(tokens, training.longest) * shape.head_dim * 4
    backward = tokens * (4 * h + 2 * m) + attention
    last = tokens * (inputs + (layers - recompute_layers) * layer) + max(loss, backward)
    again = tokens * (inputs + layer) + backward if recompute_layers else 0
    return (max(last, again) + tokens * _HOLES * 2 * h) / GIB + _RESERVED_GIB[capture]


def kept_bytes(shape: ModelShape, training: Training) -> float:
    """Bytes that a layer keeps of a token for its backward pass; attention's sums of exponents are in fp32."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    parts = (shape.hidden_size, q, kv, shape.intermediate_size, training.r)
    widths = sum(times * part for times, part in zip(_KEPT[training.backend], parts, strict=True))
    return 2 * widths + 4 * shape.num_attention_heads


def train_flops(shape: ModelShape, tokens: int) -> float:
    """Arithmetic of a forward and backward pass without recomputation: the base is frozen, so 4 a weight and token."""
    return tokens * 4.0 * (shape.linear_weights + shape.vocab_size * shape.hidden_size)


def pass_seconds(
    shape: ModelShape, training: Training, rates: Rates, tokens: int, recompute_layers: int, *, row: float,
    capture: bool,
) -> float:  # fmt: skip
    """Seconds of a pass over `tokens` tokens, filling included: what the card takes, or Python's launches if longer.

    `row` is the length of the row that a token finds itself in, in the mean over the pass's tokens.
    """
    layers, again = shape.num_hidden_layers, recompute_layers / shape.num_hidden_layers
    flops = train_flops(shape, tokens) + again * 1.8 * tokens * shape.linear_weights  # forward alone runs faster
    flops += tokens * shape.lora_weights(training.r) * (6.0 + 2.0 * again)
    width = shape.num_attention_heads * shape.head_dim
    attended = 2.0 * tokens * (row + _ATTENTION_TOKENS) * width * layers * (3.5 + again)
    moved = tokens * layers * (_PASSED_OVER * 2.0 * shape.hidden_size * (1 + 0.4 * again) + _lora_bytes(shape, again))
    if training.load_in_4bit:
        moved += (2 + again) * shape.linear_weights * training.unpack_bytes
    card = flops / (rates.tflops * 1e12) + attended / ((rates.attention or rates.tflops) * 1e12)
    card += moved / (rates.gb_per_s * 1e9) + layers * _KERNEL_SECONDS * (1 + again)
    launch = LAUNCH_SECONDS[training.backend] * rates.launch * (layers / 32) * (1 + 0.75 * again)
    return card if capture else max(card, launch)  # torch's checkpoint is slow to launch, too


def _lora_bytes(shape: ModelShape, again: float) -> float:
    """Bytes that LoRA's thin products read and write of a token and layer, forward and backward.

    Forward each reads its input and adds to its output; backward each reads both once more and the output's gradient
    twice, and adds to the input's gradient.
    """
    inside, outside = (sum(sizes) for sizes in zip(*shape.linear_shapes, strict=True))
    return (2 * inside + 4 * outside) * (1 + again) + 6 * inside + 4 * outside
