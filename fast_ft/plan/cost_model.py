"""What a training pass and a step take: seconds of the card, and of the host that launches them. Pure arithmetic.

A pass of T tokens over the frozen base does 4 operations for each weight and token, and 2 more where a layer's
activations are computed again; the base needs no weight gradients. It turns the 4-bit weights to 16 bits once forward
and once backward. What it reads and writes beside that is counted kernel by kernel for our own blocks. By how much each
part is slower than a card's rates say was fitted on a card (constants.json); elsewhere it is a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast_ft.hub.families import ModelShape
from fast_ft.plan.constants import SECONDS
from fast_ft.plan.training_work import Rates, Training

#: Python's time to launch a 32-layer model's forward and backward kernels through other layers, on an H200's host.
_LAUNCH_SECONDS = {"unsloth": 0.17, "peft": 0.2}
STEP_SECONDS = 0.03  #: optimizer, clipping and log of one step of a trainer that waits for each
CAPTURE_SECONDS = 0.3  #: to capture the graph of one width
OPTIMIZER_BYTES = 40  #: of a trained weight that clearing, measuring, clipping and stepping read and write
_KERNEL_SECONDS = 2.6e-4  #: of a layer's small kernels, forward and backward, of other backends
_PASSED_OVER = 95  #: how often other backends' small kernels read or write as much as a token's hidden state, both ways
_ATTENTION_TOKENS = 160  #: that a row costs beside its own in torch's memory-efficient attention


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a pass: of the card, and of the host that launches it. Whichever is longer is what it takes alone."""

    card: float
    host: float


def train_flops(shape: ModelShape, tokens: int) -> float:
    """Arithmetic of a forward and backward pass without recomputation: the base is frozen, so 4 a weight and token."""
    return tokens * 4.0 * (shape.linear_weights + shape.vocab_size * shape.hidden_size)


def pass_seconds(
    shape: ModelShape, training: Training, rates: Rates, tokens: int, recompute_layers: int, *, row: float,
    capture: bool,
) -> PassSeconds:  # fmt: skip
    """Return the seconds of a pass over `tokens` tokens, filling included.

    `row` is the length of the row that a token finds itself in, in the mean over the pass's tokens.
    """
    if training.backend != "fused":
        return _of_others(shape, training, rates, tokens, recompute_layers, row=row, capture=capture)
    parts = card_parts(shape, training, rates, tokens, recompute_layers, row=row)
    card = sum(SECONDS[name] * seconds for name, seconds in parts.items())
    layers = shape.num_hidden_layers
    if capture:
        return PassSeconds(card, SECONDS["captured_host_layer"] * layers * rates.launch)
    host = SECONDS["host_layer"] * layers + SECONDS["host_again"] * recompute_layers
    return PassSeconds(card, host * rates.launch)


def forward_seconds(shape: ModelShape, training: Training, rates: Rates, tokens: int, *, row: float) -> PassSeconds:
    """Return the seconds of a forward pass alone, without a graph; `tokens` and `row` are as in pass_seconds.

    It is what a pass takes longer where all layers are computed again, and the product with the head.
    """
    once, again = (
        pass_seconds(shape, training, rates, tokens, count, row=row, capture=False)
        for count in (0, shape.num_hidden_layers)
    )
    head = 2.0 * tokens * shape.vocab_size * shape.hidden_size / (rates.tflops * 1e12)
    return PassSeconds(again.card - once.card + head, again.host - once.host)


def card_parts(
    shape: ModelShape, training: Training, rates: Rates, tokens: int, recompute_layers: int, *, row: float
) -> dict[str, float]:
    """Return the parts of a pass through our own blocks, each in seconds by the card's rates alone.

    What each really takes is that many seconds times its constant.
    """
    h, m, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    q, k = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    again = recompute_layers / layers
    flops = train_flops(shape, tokens) + 2.0 * again * tokens * shape.linear_weights
    attended = 2.0 * tokens * row * q * layers * (3.5 + again)
    # norms, rotations, swiglu, residuals, gradients joined: forward, forward once more where computed again, backward
    forward, backward = 20 * h + 6 * m + 4 * (q + k), 24 * h + 12 * m + 4 * (q + k) + 4 * (q + 2 * k)
    head_norms = 12 * (q + k) * (1 + again) + 18 * (q + k) if training.qk_norms else 0.0
    moved = tokens * layers * (forward * (1 + again) + backward) + tokens * shape.vocab_size * 8
    tflops, bandwidth = rates.tflops * 1e12, rates.gb_per_s * 1e9
    if training.flash:
        name, attention = "flash", attended / tflops
    else:
        name = "efficient_attention"
        attention = attended * (row + _ATTENTION_TOKENS) / max(row, 1.0) / ((rates.attention or rates.tflops) * 1e12)
    unpacked = (2 + again) * shape.quantised_weights if training.load_in_4bit else 0
    return {
        "products": flops / tflops,
        name: attention,
        "elementwise": moved / bandwidth,
        "lora": tokens * layers * _lora_bytes(shape, again) / bandwidth,
        "unpacking": unpacked / bandwidth,
        "head_norms": tokens * layers * head_norms / bandwidth,
        "layer": layers * (1 + 0.4 * again),
        "pass": 1.0,
    }


def step_overhead(shape: ModelShape, training: Training, rates: Rates) -> PassSeconds:
    """Return the seconds of a step beside its passes: clipping, optimizer and log.

    Our own trainer launches a step while the one before is computed, so that host and card work side by side.
    """
    weights = shape.lora_weights(training.r) + training.whole_weights
    card = SECONDS["optimizer"] * weights * OPTIMIZER_BYTES / (rates.gb_per_s * 1e9) + SECONDS["step"]
    host = SECONDS["host_step"] + SECONDS["host_step_layer"] * shape.num_hidden_layers
    return PassSeconds(card, host * rates.launch)


def _of_others(
    shape: ModelShape, training: Training, rates: Rates, tokens: int, recompute_layers: int, *, row: float,
    capture: bool,
) -> PassSeconds:  # fmt: skip
    """Return the seconds of a pass through Unsloth's or PEFT's layers: fitted on an H200, and held to runs on a T4."""
    layers, again = shape.num_hidden_layers, recompute_layers / shape.num_hidden_layers
    flops = train_flops(shape, tokens) + again * 1.8 * tokens * shape.linear_weights  # forward alone runs faster
    flops += tokens * shape.lora_weights(training.r) * (6.0 + 2.0 * again)
    width = shape.num_attention_heads * shape.head_dim
    attended = 2.0 * tokens * (row + _ATTENTION_TOKENS) * width * layers * (3.5 + again)
    moved = tokens * layers * (_PASSED_OVER * 2.0 * shape.hidden_size * (1 + 0.4 * again) + _lora_bytes(shape, again))
    if training.load_in_4bit:
        moved += (2 + again) * shape.quantised_weights * training.unpack_bytes
    card = flops / (rates.tflops * 1e12) + attended / ((rates.attention or rates.tflops) * 1e12)
    card += moved / (rates.gb_per_s * 1e9) + layers * _KERNEL_SECONDS * (1 + again)
    if capture:
        return PassSeconds(card, 0.0)
    launch = _LAUNCH_SECONDS[training.backend] * rates.launch * (layers / 32) * (1 + 0.75 * again)
    return PassSeconds(card, launch)  # torch's checkpoint is slow to launch, too


def _lora_bytes(shape: ModelShape, again: float) -> float:
    """Bytes that LoRA's thin products read and write of a token and layer, forward and backward.

    Forward each reads its input and adds to its output; backward each reads both once more and the output's gradient
    twice, and adds to the input's gradient.
    """
    inside, outside = shape.linear_sides
    return (2 * inside + 4 * outside) * (1 + again) + 6 * inside + 4 * outside
