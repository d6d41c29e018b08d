"""What the 4-bit kernels rest on: their decoding program, run instruction by instruction, and the order of columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from fast_ft.generate.engine import nf4_linear
from fast_ft.models import nf4

Words = torch.Tensor  #: 32-bit words, in int64


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """PTX: four bytes of the eight in a and b; a selector's fourth bit repeats the byte's sign instead."""
    source = torch.stack([word >> shift & 0xFF for word in (a, b) for shift in (0, 8, 16, 24)], dim=-1)
    out = torch.zeros_like(selector)
    for index in range(4):
        nibble = selector >> 4 * index & 0xF
        byte = source.gather(-1, (nibble & 7)[..., None])[..., 0]
        byte = torch.where(nibble > 7, (byte > 127).long() * 0xFF, byte)
        out |= byte << 8 * index
    return out


def halves(words: Words, dtype: torch.dtype) -> torch.Tensor:
    parts = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return torch.where(parts > 0x7FFF, parts - 0x10000, parts).to(torch.int16).view(dtype).double()


def joined(pair: torch.Tensor, dtype: torch.dtype) -> Words:
    low, high = (pair.to(dtype).view(torch.int16).long() & 0xFFFF).unbind(-1)
    return low | high << 16


def run(program: str, inputs: dict[str, Words], dtype: torch.dtype) -> dict[str, Words]:
    """Carry out a PTX program of the few instructions that the decoder has."""
    register = dict(inputs)
    shape = next(iter(inputs.values())).shape

    def fma(a: Words, b: Words, c: Words) -> Words:
        return joined(halves(a, dtype) * halves(b, dtype) + halves(c, dtype), dtype)

    does: dict[str, Callable[..., Words]] = {
        "mov": lambda a: a, "and": torch.bitwise_and, "or": torch.bitwise_or, "prmt": prmt, "fma": fma,
        "shr": lambda a, n: a >> n, "shl": lambda a, n: a << n & 0xFFFFFFFF,
        "lop3": lambda a, b, c, table: a & b | ~a & c & 0xFFFFFFFF,
    }  # fmt: skip
    for line in program.splitlines():
        if not (found := re.fullmatch(r"(\w+)\.[\w.]+ (.+);", line)) or line.startswith(".reg"):
            continue
        target, *given = found[2].split(", ")
        assert found[1] != "lop3" or given[-1] == "0xCA"
        values = [
            register[each] if each in register else torch.full(shape, int(each, 0), dtype=torch.int64) for each in given
        ]
        register[target] = does[found[1]](*values)
    return register


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize(("dtype", "kind", "bound"), [(torch.float16, "f16", 2.3e-4), (torch.bfloat16, "bf16", 1.9e-3)])
def test_the_decoder_gives_what_bitsandbytes_dequantises_to(
    words: int, dtype: torch.dtype, kind: str, bound: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (5000, 4 * words), generator=draw)
    absmax = torch.rand(5000, generator=draw) * 0.1 + 0.005
    inputs = {f"${4 * words + i}": sum(packed[:, 4 * i + b] << 8 * b for b in range(4)) for i in range(words)}
    inputs[f"${5 * words}"] = nf4.pack_scales(absmax, dtype).long() & 0xFFFFFFFF
    name = str(dtype).removeprefix("torch.")

    def weights(rest: list[int] | None) -> torch.Tensor:
        registers = run(nf4.decoder(nf4.code_bits(name), kind, words, rest), inputs, dtype)  # type: ignore[arg-type]
        return torch.stack([halves(registers[f"${i}"], dtype) for i in range(4 * words)], dim=1).flatten(1)

    made = weights(None)
    code = get_4bit_type("nf4", "cpu")
    index = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)  # a byte's first weight is its high nibble
    true = code[index].double() * absmax[:, None].double()
    off = ((made - true).norm() / true.norm()).item()
    theirs = (((code[index] * absmax[:, None]).to(dtype).double() - true).norm() / true.norm()).item()
    assert off < bound and off < 1.1 * theirs, "about as far from the true weights as bitsandbytes' rounding"
    assert torch.equal(code, torch.tensor(nf4.CODES))
    rounded = (code[index] * absmax[:, None]).to(dtype).double()
    assert (made != rounded).double().mean() > 0.1
    assert (weights(nf4.rest_bits(name)) != rounded).double().mean() < 0.01, "with both parts of a code"


def test_plane_order_puts_the_same_pair_of_each_16_columns_side_by_side() -> None:
    order = nf4.plane_order(256)
    assert sorted(order.tolist()) == list(range(256))
    assert order[:18].tolist() == [0, 1, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 96, 97, 112, 113, 2, 3]
    assert order[128:132].tolist() == [128, 129, 144, 145]
    x = torch.randn(3, 256)
    assert torch.equal(nf4.to_planes(x), x[:, order])


def test_pieces_hold_the_pairs_that_four_lanes_multiply_at_once_for_all_rows() -> None:
    """Lane c has the 16 bytes of codes of columns 32 c to 32 c + 31; its byte b meets the b-th piece."""
    x = torch.arange(3 * 256).view(3, 256)
    piece_PT8 = nf4.to_pieces(x).view(32, 3, 8)
    assert nf4.to_pieces(x).shape == x.shape
    for block, byte, row in ((0, 0, 0), (0, 5, 2), (1, 15, 1)):
        pairs = [x[row, 128 * block + 32 * lane + 2 * byte :][:2].tolist() for lane in range(4)]
        assert piece_PT8[16 * block + byte, row].view(4, 2).tolist() == pairs
    assert nf4.arranged(x, nf4.Order.ROWS) is x
    assert torch.equal(nf4.arranged(x, nf4.Order.PIECES), nf4.to_pieces(x))


def test_a_scale_in_two_parts_loses_nothing_that_counts() -> None:
    scale = torch.rand(1000) * 0.2 + 1e-3
    for dtype, bound in ((torch.float16, 1e-4), (torch.bfloat16, 1e-4)):
        packed = nf4.pack_scales(scale, dtype)
        back = halves(packed.long() & 0xFFFFFFFF, dtype).sum(-1) * nf4.FACTOR[str(dtype).removeprefix("torch.")]
        assert ((back - scale.double()).abs() / scale).max().item() < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_whatever_their_state_says(dtype: torch.dtype) -> None:
    """Stored bases often say bfloat16. Rounded to that first, float16 weights were 8 times as far from true ones."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    true = torch.tensor(nf4.CODES)[torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()].view(-1, 64)
    true = (true * state.absmax.view(-1, 1)).view(64, 256)
    made = nf4.dequantised(packed, state, dtype)
    assert made.dtype == dtype and torch.equal(made, true.to(dtype))
    assert state.dtype == torch.bfloat16, "the state is the model's own"
    layer: Any = SimpleNamespace(weight=SimpleNamespace(data=packed, quant_state=state), bias=None)
    product = nf4_linear.dequantised([layer], dtype)
    assert torch.equal(product(torch.eye(256, dtype=dtype)), true.to(dtype).T)
