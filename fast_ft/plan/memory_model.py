"""What a training pass holds on a card: which tensors live at the moments that may be its peak. Pure arithmetic.

For our own blocks each moment is counted from the shapes of what is alive there (models/fused_block/block.py,
train/loss.py); on a card the counts were found again by the allocator's own history (bench/plan_samples.py). What no
tensor explains is in constants.json: cuBLAS's workspaces, the rest of an allocator's last pages, the CUDA context.
Unsloth's and PEFT's layers have fitted sums in place of moments.

Bytes are named by what they are a multiple of: h hidden size, q and k the widths of queries and of keys, m the MLP's
inner size, r LoRA's rank, T tokens of the pass.
"""

from __future__ import annotations

import math

from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.constants import MEMORY
from fast_ft.plan.training_work import Training

#: What a layer of other backends keeps of a token, in 16 bits, in multiples of h, q, k, m and r. A 7B's h, q and k are
#: one number; only their sum was measured.
_KEPT = {"unsloth": (1.8, 2, 2, 3, 0), "peft": (4.8, 2, 2, 5, 0)}
_HOLES = 32  #: hidden states a token that lie idle between those of other backends


def fixed_gib(shape: ModelShape, training: Training) -> float:
    """Memory that any pass finds taken: context, base, what is trained with gradients and AdamW's states, buffers.

    Trained weights are fp32, and LoRA's have a copy in the base's dtype. 4-bit weights are unpacked into buffers as
    large as gate and up side by side.
    """
    states = 2 * (1 + 4 / 256) if training.optim == "adamw_8bit" else 8
    lora, whole = shape.lora_weights(training.r), training.whole_weights
    trained = (lora + whole) * (4 + 4 + states) + shape.number_bytes * lora + _zeros_bytes(shape, training)
    unpacked = 2 * shape.number_bytes * shape.hidden_size * shape.intermediate_size if training.load_in_4bit else 0
    if training.backend != "fused":  # of one layer, its matrices once more, and their gradients
        trained += lora * 10 / shape.num_hidden_layers
    buffers = unpacked * MEMORY["unpack_buffers"]
    return MEMORY["context_gib"] + shape.weights_gib(load_in_4bit=training.load_in_4bit) + (trained + buffers) / GIB


def pass_gib(
    shape: ModelShape, training: Training, tokens: int, recompute_layers: int, *, capture: bool = False
) -> float:
    """Memory of a pass over `tokens` tokens at its peak. A layer that is computed again keeps its input.

    Tensors are counted in 16 bits. Of a base in 32 bits all are counted twice: too much, since some are so anyway.
    """
    way, times = "captured" if capture else "eager", shape.number_bytes / 2
    if training.backend != "fused":
        held = _of_others(shape, training, tokens, recompute_layers) * times
        return held / GIB + MEMORY["others_gib"][way]
    moments = pass_moments(shape, training, tokens, recompute_layers)
    workspaces = MEMORY["workspaces"][way] * MEMORY["workspace_mib"] / 1024
    grown = MEMORY["graphs_context_gib"] if capture else 0.0
    return max(moments.values()) * times / GIB + workspaces + MEMORY["rest_gib"] + grown


def pass_moments(shape: ModelShape, training: Training, tokens: int, recompute_layers: int) -> dict[str, float]:
    """Return the bytes that are alive where our own blocks' pass may be at its peak."""
    h, m, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    layer = kept_bytes(shape, training, tokens)
    kept = tokens * 2 * h * recompute_layers + (layers - recompute_layers) * layer
    whole = _whole_bytes(training)
    backward, forward = _backward_bytes(shape, training, tokens), tokens * (2 * m + 6 * h)
    copied = tokens * 2 * h  # the last layer's output's gradient, which room for LoRA's columns is put behind
    found = {
        # the last norm's input in fp32 and its result, the loss's gradient, logits that become their gradients
        "loss": kept + tokens * 8 * h + min(tokens, training.loss_positions) * shape.vocab_size * 2 + whole,
        # torch's own norm, in fp32: its input, its gradient by the product, that of the mean, and three steps of the
        # square's derivative, all of which torch holds to the end of that expression
        "last norm": kept + tokens * 6 * 4 * h + whole,
    }
    if recompute_layers < layers:
        found["last layer"] = kept + copied + backward
    if recompute_layers:
        inputs = tokens * 2 * h * (recompute_layers - 1)  # the last one's is among what the layer itself keeps
        found["computed again"] = inputs + layer + max(backward + copied * (recompute_layers == layers), forward)
    return found


def _backward_bytes(shape: ModelShape, training: Training, tokens: int) -> float:
    """Bytes that a layer's backward pass needs at its peak, beside what was kept: in the MLP, or in attention."""
    h, m = shape.hidden_size, shape.intermediate_size
    q, k = _widths(shape)
    grouped = k < q
    mlp = tokens * (2 * h + 2 * m)
    around = 4 * h + 2 * q  # gradients of the output and of the middle; attention's result
    if training.flash:  # gradients; those of keys and values for each head of q; q's in fp32, 128 tokens more for a row
        attention = tokens * (around + 2 * q + 4 * k + (4 * q if grouped else 0))
        attention += (tokens + 128 * (training.rows + 1)) * 4 * q
    else:  # keys and values for each head of q, gradients of all three, and q's in fp32, of full rows
        attention = tokens * (around + (4 * q if grouped else 0) + 6 * q)
        attention += (training.rows + 1) * _longest(training, tokens) * 4 * q
    joined = tokens * (around + 2 * (2 * q + 4 * k))  # the three gradients, and once more side by side
    ends = tokens * (2 * q + 4 * k + 10 * h)  # those of the norm and of the input, and the norm itself
    return max(mlp, attention, joined, ends) + 4 * shape.lora_weights(training.r) / shape.num_hidden_layers


def kept_bytes(shape: ModelShape, training: Training, tokens: int) -> float:
    """Bytes that a layer keeps of a pass for its backward pass.

    Our own keep: x, q, k, v, attention's result, mid, gate, up, the inner side of LoRA's seven pairs, two norms' scales
    and attention's sums of exponents; where q and k have norms, both before these too.
    """
    h, m, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    q, k = _widths(shape)
    if training.backend != "fused":
        parts = (h, q, k, m, training.r)
        widths = sum(times * part for times, part in zip(_KEPT[training.backend], parts, strict=True))
        return tokens * (2 * widths + 4 * heads)
    kept = 2 * (2 * h + 2 * q + 2 * k + 2 * m + 7 * training.r) + 8
    if training.qk_norms:
        kept += 2 * (q + k) + 4 * (heads + shape.num_key_value_heads)
    sums = tokens if training.flash else (training.rows + 1) * _longest(training, tokens)
    return tokens * kept + 4 * heads * sums


def _of_others(shape: ModelShape, training: Training, tokens: int, recompute_layers: int) -> float:
    """Bytes of a pass through Unsloth's or PEFT's layers: fitted on an H200 with a 7B (docs/performance.md).

    The peak is where the forward pass ends, beside the loss's logits; where the last layer goes backward, beside what
    attention's backward pass takes for the longest row; or where the last of the recomputed layers goes backward.
    """
    h, m, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    layer = kept_bytes(shape, training, tokens)
    inputs = 0 if training.offloaded else tokens * recompute_layers * 2 * h
    loss = min(tokens, training.loss_positions) * shape.vocab_size * training.logit_bytes + tokens * 4 * h
    q, _ = _widths(shape)
    attention = (training.rows + 1) * min(tokens, training.longest) * 4 * q
    backward = tokens * (4 * h + 2 * m) + attention
    last = inputs + (layers - recompute_layers) * layer + max(loss, backward)
    again = inputs + layer + backward if recompute_layers else 0
    return max(last, again) + tokens * _HOLES * 2 * h + _whole_bytes(training)


def _zeros_bytes(shape: ModelShape, training: Training) -> int:
    """Bytes of zeros in LoRA's copies: where ranks are small, B of q, k, v are one matrix, as are B of gate and up."""
    if training.backend != "fused":
        return 0
    q, k = _widths(shape)
    groups = ((3, q + 2 * k), (2, 2 * shape.intermediate_size))
    zeros = sum((count - 1) * width for count, width in groups if count * training.r <= MEMORY["joint_rank"])
    return shape.number_bytes * zeros * training.r * shape.num_hidden_layers


def _whole_bytes(training: Training) -> int:
    """Bytes of a pass's own gradients of modules that are trained whole, in fp32, and of their weights in 16 bits."""
    return 6 * training.whole_weights


def _widths(shape: ModelShape) -> tuple[int, int]:
    return shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim


def _longest(training: Training, tokens: int) -> int:
    """Return the longest row of a pass, as attention's kernel takes it: at least 128, in steps of 32."""
    return 32 * math.ceil(min(tokens, max(128, training.longest)) / 32)
