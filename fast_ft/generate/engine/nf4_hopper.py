"""A product of few rows with 4-bit weights by the tensor cores of Hopper cards: nf4_hopper.cu, compiled and launched.

For compute capability 9.0 alone. Shapes: M rows of x, K inputs, N outputs, R ranks of the LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fast_ft.generate.engine.cuda_kernel import CudaKernel, tensor_map
from fast_ft.generate.engine.nf4_mma import code_defines, dealt, processors_of, room_for
from fast_ft.generate.engine.nvrtc import compiled
from fast_ft.models.nf4 import Order

NAME = "the CUDA kernel for Hopper"
MULTIPLE, CAPABILITY = 128, (9, 0)  #: as nf4_linear.Way's
NEWEST: tuple[int, int] | None = (9, 0)
_WIDE = 256  #: outputs of a wide tile


@dataclass(frozen=True)
class Cut:
    """How a block divides its work; the names in nf4_hopper.cu are the same, in capitals."""

    mt: int  #: eights of rows
    wg: int  #: fours of warps that multiply
    mg: int  #: 64s of outputs of four warps
    stages: int  #: chunks under way

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return 128 * self.wg + 128

    @property
    def tile(self) -> int:
        """Outputs of a block."""
        return 64 * self.mg * self.wg

    @property
    def chunk(self) -> int:
        """Columns in a stage."""
        return 128

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block asks for: the table, the stages, and two barriers of each."""
        return (64 << 10) + self.stages * (self.tile * 72 + self.mt * 2048 + 16)


def order_for(rows: int) -> Order:
    """Return the order in which `product` wants that many rows of x."""
    return Order.PIECES


def source(cut: Cut, dtype: str) -> str:
    """Return the CUDA C++ for a cut and "float16" or "bfloat16"."""
    given = {"MT": cut.mt, "WG": cut.wg, "MG": cut.mg, "STAGES": cut.stages}
    head = "".join(f"#define {name} {value}\n" for name, value in given.items()) + code_defines(dtype)
    kernel = Path(__file__).with_name("nf4_hopper.cu").read_text(encoding="utf-8")
    return head + _wgmma(cut.mt, "f16" if dtype == "float16" else "bf16") + kernel


def _wgmma(mt: int, kind: str) -> str:
    """Return the function that multiplies 64 outputs by 8 mt rows over 16 columns, whose operands are that many."""
    last = 4 * mt
    sums = ", ".join(f"%{i}" for i in range(last))
    bound = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(last))
    weights = ", ".join(f"%{last + i}" for i in range(4))
    return (
        f"__device__ __forceinline__ void wgmma(float (&d)[{mt}][4], const unsigned (&a)[4], unsigned x) {{\n"
        f'  asm volatile("{{.reg .b64 at;\\nmov.b64 at, {{%{last + 4}, 8}};\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{8 * mt}k16.f32.{kind}.{kind} '
        f'{{{sums}}}, {{{weights}}}, at, 1, 1, 1, 0;}}"\n'
        f'      : {bound} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x));\n}}\n'
    )


@functools.cache
def kernel(cut: Cut, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """Return the kernel for a cut, compiled and loaded."""
    cubin = compiled(source(cut, str(dtype).removeprefix("torch.")), (), CAPABILITY, own=True)
    return CudaKernel(cubin, "product", device, threads=cut.threads, shared=cut.shared, early=True)


def cut_for(rows: int, outputs: int, processors: int) -> Cut:
    """Return how work is cut for that many rows, 128 at most, on a card with that many multiprocessors.

    Wide tiles read x less often. Narrow ones leave less to be added where several blocks share a tile; with many rows
    that counts.
    """
    eights = -(-rows // 8)
    if eights > 8:
        return Cut(eights, 2, 1, 4 if eights <= 14 else 3)
    if eights > 4 and 2 * outputs <= _WIDE * processors:
        return Cut(eights, 2, 1, 6)
    return Cut(eights, 2, 2, 4)


def parts_for(rows: int, outputs: int, inputs: int, device: torch.device) -> int:
    """Return in how many parts `product` leaves a product."""
    cut = cut_for(rows, outputs, processors_of(device))
    return dealt(cut, outputs, inputs, device)[1]


def compare(x_MK: Tensor, words: Tensor, scales: Tensor, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return x's products as products of these (outputs, inputs) are cut: whole, and in parts that end within chunks'
    rows."""
    cuts = {cut_for(len(x_MK), outputs, processors_of(x_MK.device)) for outputs, _ in shapes}
    return {
        f"{cut}, {n} blocks": product(x_MK, words, scales, None, None, cut, n)
        for cut in sorted(cuts, key=str)
        for n in (1, 3, 5)
    }


def product(
    x_MK: Tensor,
    words: Tensor,
    scales: Tensor,
    xa_MR: Tensor | None,
    b_NR: Tensor | None,
    cut: Cut | None = None,
    blocks: int = 0,
) -> Tensor:
    """Return x times the weights, and xa times b, as MN; or fp32 parts of it, (parts, M, N), to be added in order.

    `x_MK` is in pieces (nf4.to_pieces), without gaps. `words` is (N, K / 8) int32 as bitsandbytes packs, `scales`
    (K / 64, N) as nf4.pack_scales returns them. K is a multiple of 128, R of 16, N of 4; `xa_MR` None is no LoRA. The
    weights are read while the launch before this one ends: it must not be what writes them.
    """
    (rows, inputs), outputs = x_MK.shape, len(words)
    cut = cut or cut_for(rows, outputs, processors_of(x_MK.device))
    blocks, parts = dealt(cut, outputs, inputs, x_MK.device, blocks)
    out = room_for(x_MK, outputs, parts)
    xa, b, ranks = (x_MK, x_MK, 0) if xa_MR is None or b_NR is None else (xa_MR, b_NR, xa_MR.shape[1])
    each = 2 * cut.mg  # outputs of a lane: the first ones of all lanes lie side by side in a stage, then the second
    row = inputs // 2
    codes = tensor_map(words, (row, outputs // each, each), (each * row, row), (cut.chunk // 2, cut.tile // each, each))
    kernel(cut, x_MK.dtype, x_MK.device)(
        (blocks, 1), codes, x_MK, scales, xa, b, out, rows, outputs, inputs, xa.stride(0), ranks, parts
    )
    return out
