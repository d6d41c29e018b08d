"""What a T4 asks of each kernel, and what plain torch says to the same numbers.

Each call returns pairs of ours and torch's, and the share by which they may differ. Sizes are those of a 7B, and
activations as large as its own: Llama-2-7B has some of 2,600; fp16 ends at 65,504. Where kernels are only compiled,
on a machine without a card, the numbers mean nothing and the sizes are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN, INNER, HEAD = 4096, 11008, 128
SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  #: of a 7B's weights, side by side


class Pair(NamedTuple):
    """What a kernel made, what plain torch made, and the share of torch's norm by which they may differ."""

    made: Tensor
    expected: Tensor
    within: float = 0.004


def _normal(device: str, *shape: int, times: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * times).half()


def norms(device: str, peak: float) -> Iterator[Pair]:
    """RMS norms of rows in which single activations are as large as `peak`."""
    from fast_ft.models.fused_block import ops_torch, ops_triton

    x = torch.randn(257, HIDDEN, device=device)
    x[0, 1415 % HIDDEN], x[3, 2533 % HIDDEN] = -peak, peak
    x, weight = x.half(), torch.rand(HIDDEN, device=device).half()
    grad, residual = (_normal(device, 257, HIDDEN, times=30) for _ in range(2))  # as with fp16's loss scale
    (made, scale), (expected, plain_scale) = (ops.rms_norm(x, weight, 1e-5) for ops in (ops_triton, ops_torch))
    yield Pair(made, expected)
    yield Pair(ops_triton.rms_norm(x, weight, 1e-5, 64)[0][:, :HIDDEN], expected)
    yield Pair(scale, plain_scale)
    backs = [ops.rms_norm_backward(grad, x, weight, plain_scale, residual) for ops in (ops_triton, ops_torch)]
    yield from (Pair(made, expected) for made, expected in zip(*backs, strict=True))
    apart = torch.cat((residual, residual), dim=1)[:, :HIDDEN]
    wide, _ = ops_triton.rms_norm_backward(grad, x, weight, plain_scale, apart, 64)
    yield Pair(wide[:, :HIDDEN], backs[1][0])
    yield Pair(wide[:, HIDDEN:], torch.zeros(257, 64, device=device))


def rotations(device: str) -> Iterator[Pair]:
    """The heads of q and k turned by their tokens' angles, and back; those of v lie beside them."""
    from fast_ft.models.fused_block import ops_torch, ops_triton

    cos, sin = (_normal(device, 65, HEAD // 2).repeat(1, 2) for _ in range(2))
    for heads, kv_heads in ((32, 32), (32, 8)):
        both, apart = heads + kv_heads, heads + 2 * kv_heads
        whole = _normal(device, 65, apart * HEAD)
        turned = [whole.clone(), whole.clone()]
        for ops, each in zip((ops_triton, ops_torch), turned, strict=True):
            ops.rotate_(each.view(65, apart, HEAD)[:, :both], cos, sin)
        yield Pair(*turned)
        parts = whole.view(65, apart, HEAD).split([heads, kv_heads, kv_heads], dim=1)
        for room in (0, 64):
            made, expected = (ops.rotate_back(*parts, cos, sin, room) for ops in (ops_triton, ops_torch))
            yield Pair(made, expected)


def swiglu(device: str, peak: float) -> Iterator[Pair]:
    """The MLP's gate, forward and backward, over values up to `peak`."""
    from fast_ft.models.fused_block import ops_torch, ops_triton

    both = (torch.randn(65, 2 * INNER, device=device) * peak / 3).clamp(-peak, peak).half()
    grad = _normal(device, 65, INNER, times=10)
    yield Pair(ops_triton.swiglu(both), ops_torch.swiglu(both))
    yield Pair(ops_triton.swiglu(both, 64)[:, :INNER], ops_torch.swiglu(both))
    changed = [(both.clone(), grad.clone()) for _ in range(2)]
    ops_triton.swiglu_backward_(*changed[0])
    ops_torch.swiglu_backward_(*changed[1])
    yield from (Pair(made, expected) for made, expected in zip(*changed, strict=True))


def losses(device: str, vocabulary: int) -> Iterator[Pair]:
    """The loss of each position and the gradients of its logits, some of them as large as fp16 goes; one is masked."""
    from fast_ft.models.fused_block import ops_torch, ops_triton

    logits, target = _normal(device, 65, vocabulary, times=5), torch.randint(vocabulary, (65,), device=device)
    logits[0, 3], logits[1, 7], target[2] = 60000.0, -60000.0, -100
    both = [logits.clone(), logits.clone()]
    made, expected = (ops.cross_entropy_(each, target) for ops, each in zip((ops_triton, ops_torch), both, strict=True))
    yield from (Pair(made, expected), Pair(*both))


def weights(device: str, shape: tuple[int, int], *, nested: bool) -> Iterator[Pair]:
    """4-bit weights turned to 16 bits as training does it: 32 blocks four times in a program."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from fast_ft.models.fused_block import ops_triton

    packed, state = quantize_4bit(_normal(device, *shape, times=0.02), quant_type="nf4", compress_statistics=nested)
    out, groups = torch.empty(shape, dtype=torch.float16, device=device), None
    if nested:
        inner = state.state2
        offset = torch.full_like(inner.absmax, float(state.offset)).view(-1)
        groups = (inner.code.float(), inner.absmax.float().view(-1), offset)
    ops_triton.unpack(packed.view(-1), state.absmax.view(-1), groups, out)
    yield Pair(out, dequantize_4bit(packed, state), 5e-4)
    wide = torch.zeros(shape[0], shape[1] + 64, dtype=torch.float16, device=device)
    lora = _normal(device, shape[0], 48)
    ops_triton.unpack(packed.view(-1), state.absmax.view(-1), groups, wide[:, :-64], lora, wide[:, -64:-16])
    yield Pair(wide[:, :-64], dequantize_4bit(packed, state), 5e-4)
    yield Pair(wide[:, -64:], torch.nn.functional.pad(lora, (0, 16)), 1e-6)


def optimizer_steps(device: str) -> Iterator[Pair]:
    """A step of AdamW over moments of 8 bits, with weights that fill no whole block; and one that is skipped."""
    from bitsandbytes import functional

    from fast_ft.train import adamw_8bit, adamw_8bit_triton

    count = 256 * 33 + 77
    tables = [functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
    moments = [torch.randn(count, device=device) * 1e-3, torch.rand(count, device=device) * 1e-6]
    start = torch.randn(count, device=device) * 0.02
    gradient = torch.randn(count, device=device) * 1e-3
    for skip in (0.0, 1.0):
        numbers = torch.tensor([skip, 3e-4, 1.5], device=device)
        found = []
        for part in (adamw_8bit_triton, adamw_8bit):
            weight = start.clone()
            state: dict[str, Tensor] = {}
            for index, (moment, table) in enumerate(zip(moments, tables, strict=True), 1):
                codes, made = functional.quantize_blockwise(moment, code=table, blocksize=256)
                state |= {f"state{index}": codes, f"qmap{index}": table, f"absmax{index}": made.absmax}
            part.update_(weight, gradient, state, numbers, (0.9, 0.999, 1e-8, 0.999))
            found.append([weight - start, *(adamw_8bit._moment(state, index) for index in "12")])
        yield from (Pair(made, expected) for made, expected in zip(*found, strict=True))


def pages(device: str, heads: int, kv_heads: int) -> Iterator[Pair]:
    """Attention over pages for many rows and for few, which have a kernel of their own."""
    from fast_ft.generate.engine import ops_torch, ops_triton
    from fast_ft.generate.engine.block_manager import PAGE
    from fast_ft.generate.engine.kv_cache import quantised

    lengths = torch.tensor([0, 1, 15, 16, 31, 200, 511, 1000] * 3, device=device)
    keys, values = (_normal(device, 1600 * PAGE, kv_heads, HEAD) for _ in range(2))
    table = torch.randperm(1599, device=device)[: 24 * 64].view(24, 64) + 1
    q = _normal(device, 24, heads + kv_heads, HEAD)[:, :heads]
    for rows in (24, 8):
        given = (q[:rows], keys, values, table[:rows], lengths[:rows])
        made, expected = (ops.paged_attention(*given, columns=64 * PAGE) for ops in (ops_triton, ops_torch))
        yield Pair(made, expected)
    (keys, of_keys), (values, of_values) = quantised(keys), quantised(values)
    given, scales = (q, keys, values, table, lengths), torch.stack([of_keys, of_values])
    made, expected = (ops.paged_attention(*given, columns=64 * PAGE, scales=scales) for ops in (ops_triton, ops_torch))
    yield Pair(made, expected)


def draws(device: str) -> Iterator[Pair]:
    """A step's end: the tokens that are drawn, the state after them, and the logits, to the last bit."""
    from fast_ft.generate.engine import kernel_compare
    from fast_ft.generate.engine.sampler import Sampler

    for sampler in (Sampler(True, 0.7, 30, 0.9), Sampler(False)):
        made, expected = kernel_compare.drawn(sampler, 32000, torch.float16, torch.device(device))
        yield from (Pair(*each, 1e-12) for each in zip(made, expected, strict=True))


def between(device: str, peak: float) -> Iterator[Pair]:
    """What lies between a decoding step's products: norms with and without what is added, gate, rope and cache."""
    from fast_ft.generate.engine import ops_torch, ops_triton
    from fast_ft.generate.engine.block_manager import PAGE

    x, weight = _normal(device, 64, HIDDEN), torch.rand(HIDDEN, device=device).half()
    x[0, 1415] = peak
    for delta in (None, _normal(device, 64, HIDDEN)):
        both = [x.clone(), x.clone()]
        made, expected = (
            ops.add_norm(each, delta, weight, 1e-5) for ops, each in zip((ops_triton, ops_torch), both, strict=True)
        )
        yield from (Pair(made, expected), Pair(*both))
    gate_up = _normal(device, 64, 2 * INNER)
    made, expected = (ops.gated(gate_up, torch.float16) for ops in (ops_triton, ops_torch))
    yield Pair(made, expected)
    for heads, kv_heads in ((32, 32), (32, 8)):
        qkv = _normal(device, 64, (heads + 2 * kv_heads) * HEAD)
        place = torch.arange(64, device=device)
        frequencies = 1e4 ** -(torch.arange(0, HEAD, 2, device=device).float() / HEAD)
        found = []
        for ops in (ops_triton, ops_torch):
            keys, values = torch.zeros(2, 128 + PAGE, kv_heads, HEAD, dtype=torch.float16, device=device)
            cos_sin = ops.rope(place, frequencies, 1.0, torch.float16)
            q, _, _ = ops.rotate_into_cache(qkv.clone(), heads, cos_sin, 2 * place + PAGE, keys, values)
            found.append((q, keys, values))
        yield from (Pair(made, expected) for made, expected in zip(*found, strict=True))


Call = Callable[[str], Iterator[Pair]]


def calls(*, small: bool) -> dict[str, Call]:
    """Return every call by name. `small`: weights of few blocks, cut as large ones are."""
    found: dict[str, Call] = {}
    for peak in (1.0, 2600.0, 60000.0):
        found[f"norms, {peak:g}"] = lambda device, peak=peak: norms(device, peak)  # type: ignore[misc]
    for peak in (3.0, 200.0):
        found[f"swiglu, {peak:g}"] = lambda device, peak=peak: swiglu(device, peak)  # type: ignore[misc]
    found["rotations"], found["draws"] = rotations, draws
    found["optimizer steps"] = optimizer_steps
    for vocabulary in (32000, 9001):
        found[f"losses over {vocabulary} tokens"] = lambda device, v=vocabulary: losses(device, v)  # type: ignore[misc]
    for shape in ((128, 256),) if small else SHAPES:
        for nested in (True, False):
            name = f"weights {shape[0]} x {shape[1]}{', doubly quantised' if nested else ''}"
            found[name] = lambda device, s=shape, n=nested: weights(device, s, nested=n)  # type: ignore[misc]
    for heads, kv_heads in ((32, 32), (32, 8)):
        found[f"pages, {heads} and {kv_heads} heads"] = lambda device, h=heads, k=kv_heads: pages(device, h, k)  # type: ignore[misc]
    for peak in (1.0, 2600.0):
        found[f"between, {peak:g}"] = lambda device, peak=peak: between(device, peak)  # type: ignore[misc]
    return found
