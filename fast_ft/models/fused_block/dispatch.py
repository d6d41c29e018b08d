"""Which module does the work between a block's products: Triton's kernels on a card, plain torch elsewhere."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fast_ft.common import out_of_memory
from fast_ft.models.fused_block import ops_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

_TOLERANCE = 0.01  #: of the largest value: 16-bit rounding is a tenth of it, a wrong kernel is far outside
#: Blocks of 64 weights that unpacking is tried on. 512 are cut as a 7B's are: four times 32 in a program, two groups of
#: double quantisation. 8 are one program of a small layer.
_BLOCKS = (512, 8)
_ROOM = 64  #: columns behind a row of which there may be none, too (linear_group.py)
_VOCABULARY = 10_000  #: whose logits the loss's kernel is tried on: it takes them in three rounds


def ops_for(tensor: Tensor) -> ModuleType:
    """Return the module whose functions take this tensor: ops_triton, or ops_torch."""
    if tensor.is_cuda:
        from fast_ft.models.fused_block import ops_triton

        return ops_triton
    return ops_torch


def check(like: Tensor, width: int, inner: int, head: int) -> str | None:
    """Run every kernel once, in the sizes that training will use; return why one cannot be relied on, or None.

    `like` is a tensor of the device and dtype to check. The sizes: hidden, of the MLP, of a head.
    """
    ours = ops_for(like)
    draw = torch.Generator(like.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        """Return random numbers like `like`."""
        return torch.randn(*shape, generator=draw, device=like.device).to(like.dtype)

    def results(ops: ModuleType) -> list[Tensor]:
        """Return what each function of a module makes of the same random numbers."""
        draw.manual_seed(0)
        x, grad, residual, weight = normal(3, width), normal(3, width), normal(3, width), normal(width)
        norm, scale = ops.rms_norm(x, weight, 1e-5)
        found = [norm, scale, *ops.rms_norm_backward(grad, x, weight, scale, residual)]
        heads, cos, sin = normal(3, 2, head), normal(3, head // 2).repeat(1, 2), normal(3, head // 2).repeat(1, 2)
        ops.rotate_(heads, cos, sin)
        gate_up, back = normal(3, 2 * inner), normal(3, inner)
        found += [heads, ops.rotate_back(*normal(3, 3, 2, head), cos, sin), ops.swiglu(gate_up)]
        found += [ops.rms_norm(x, weight, 1e-5, _ROOM)[0], ops.swiglu(gate_up, _ROOM)]
        found += ops.rms_norm_backward(grad, x, weight, scale, found[-2][:, :width], _ROOM)
        found.append(ops.rotate_back(normal(3, 5, head), *normal(2, 3, 2, head), cos, sin, _ROOM))
        ops.swiglu_backward_(gate_up, back)
        logits, target = normal(3, _VOCABULARY), torch.tensor([0, -100, _VOCABULARY - 1], device=like.device)
        found += [ops.cross_entropy_(logits, target), logits]
        return [*found, gate_up, back, *(each for count in _BLOCKS for each in unpacked(ops, count))]

    def unpacked(ops: ModuleType, count: int) -> list[Tensor]:
        """Return the weights of `count` blocks, their scales plain, and quantised themselves; the latter with room."""
        number = torch.arange(count * 32, device=like.device)
        packed, scales = (number % 256).to(torch.uint8), number[:count] % 97 + 1
        half = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float16
        plain, twice = (torch.empty(count, 64, dtype=half, device=like.device) for _ in range(2))
        ops.unpack(packed, scales.float(), None, plain)
        groups = torch.arange(-(-count // 256), device=like.device).float() + 1
        nested = (torch.linspace(-1, 1, 256, device=like.device), groups, groups)
        ops.unpack(packed, scales.to(torch.uint8), nested, twice)
        wide = torch.zeros(count // 4, 4 * 64 + _ROOM, dtype=half, device=like.device)  # four blocks are a row
        lora = (torch.arange(count // 4 * 16, device=like.device) % 7).to(half).view(-1, 16)
        ops.unpack(packed, scales.to(torch.uint8), nested, wide[:, :-_ROOM], lora, wide[:, -_ROOM : 16 - _ROOM])
        return [plain, twice, wide]

    return _difference(lambda: zip(results(ours), results(ops_torch), strict=True))


def ops_of_the_loss(like: Tensor) -> ModuleType:
    """Return the module whose `cross_entropy_` takes logits like these: ops_for's where it agrees with plain torch.

    Any loader's model is trained with this loss, those too that none of our kernels was checked for.
    """

    def results(ops: ModuleType) -> list[Tensor]:
        draw = torch.Generator(like.device).manual_seed(0)
        logits = torch.randn(3, _VOCABULARY, generator=draw, device=like.device).to(like.dtype)
        return [ops.cross_entropy_(logits, torch.tensor([0, -100, _VOCABULARY - 1], device=like.device)), logits]

    agree = _difference(lambda: zip(results(ops_for(like)), results(ops_torch), strict=True)) is None
    return ops_for(like) if agree else ops_torch


def _difference(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> str | None:
    """Return why what kernels made differs from what is expected, or why they do not run, or None."""
    try:
        for made, expected in pairs():
            difference = (made.float() - expected.float()).abs().max() / expected.float().abs().max()
            if not difference.item() <= _TOLERANCE:  # a NaN, too
                return f"a Triton kernel differs from plain torch by {difference.item():.3g} on this card"
    except Exception as error:  # a compiler on a card that it does not know may fail in any way
        if out_of_memory.is_short(error):
            raise
        return f"Triton's kernels do not run here ({type(error).__name__}: {str(error)[:200]})"
    return None
