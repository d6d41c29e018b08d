"""A product of few rows with 4-bit weights, on tensor cores: nf4_mma.cu for one cut, its compilation and its launch.

For compute capability 8.0 and up. Shapes: M rows of x, K inputs, N outputs, R ranks of the LoRA.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fast_ft.generate.engine.cuda_kernel import CudaKernel
from fast_ft.generate.engine.nvrtc import compiled
from fast_ft.models.nf4 import code_bits

_TABLE = 256 * 256  #: bytes of shared memory for the codes' table
_RESERVED = 1024  #: bytes of shared memory that the driver keeps in front of a block's own


@dataclass(frozen=True)
class Cut:
    """How a block divides its work; the names in nf4_mma.cu are the same, in capitals."""

    mt: int  #: eights of rows
    g: int  #: sixteens of outputs in a warp
    nw: int  #: warps along the outputs
    kg: int  #: groups of warps, 64 columns each
    stages: int
    blocks: int = 1  #: on a multiprocessor

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return 32 * self.nw * self.kg

    @property
    def tile(self) -> int:
        """Outputs of a block."""
        return 16 * self.g * self.nw

    @property
    def chunk(self) -> int:
        """Columns in a stage."""
        return 64 * self.kg

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block asks for."""
        stage = self.tile * self.chunk // 2 + 8 * self.mt * self.chunk * 2 + self.tile * self.kg * 4
        return _TABLE + self.stages * stage


def source(cut: Cut, dtype: str) -> str:
    """Return the CUDA C++ for a cut and "float16" or "bfloat16"."""
    given = {
        **dict(zip(("MT", "G", "NW", "KG", "STAGES", "BLOCKS"), astuple(cut), strict=True)),
        "KIND": '"f16"' if dtype == "float16" else '"bf16"', "BASE": f'"{_RESERVED}"',
        "CODE_BITS": ", ".join(map(str, code_bits(dtype))),
    }  # fmt: skip
    head = "".join(f"#define {name} {value}\n" for name, value in given.items())
    return head + Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")


@functools.cache
def kernel(cut: Cut, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """Return the kernel for a cut, compiled and loaded."""
    cubin = compiled(source(cut, str(dtype).removeprefix("torch.")), (), torch.cuda.get_device_capability(device))
    return CudaKernel(cubin, "product", device, threads=cut.threads, shared=cut.shared)


@functools.cache
def parts_of(tiles: int, chunks: int, blocks: int) -> int:
    """Return into how many parts at most a tile's chunks fall where all tiles' are dealt out evenly, in order."""

    def owner(chunk: int) -> int:
        return ((chunk + 1) * blocks - 1) // (tiles * chunks)

    return max(owner((tile + 1) * chunks - 1) - owner(tile * chunks) for tile in range(tiles)) + 1


def product(
    x_MK: Tensor, words: Tensor, scales: Tensor, xa_MR: Tensor | None, b_NR: Tensor | None, cut: Cut, blocks: int
) -> Tensor:
    """Return x times the weights, and xa times b, as MN; or fp32 parts of it, (parts, M, N), to be added in order.

    `words` is (N, K / 8) int32 as bitsandbytes packs, `scales` (K / 64, N) as nf4.pack_scales returns them. K is a
    multiple of 64, R of 16, N of 4; `xa_MR` None is no LoRA.
    """
    rows, inputs = x_MK.shape
    outputs = len(words)
    parts = parts_of(-(-outputs // cut.tile), -(-inputs // cut.chunk), blocks)
    out = x_MK.new_empty(rows, outputs) if parts == 1 else x_MK.new_empty(parts, rows, outputs, dtype=torch.float32)
    xa, b, ranks = (x_MK, x_MK, 0) if xa_MR is None or b_NR is None else (xa_MR, b_NR, xa_MR.shape[1])
    kernel(cut, x_MK.dtype, x_MK.device)(
        (blocks, 1), x_MK, words, scales, xa, b, out, rows, outputs, inputs, x_MK.stride(0), xa.stride(0), ranks, parts,
    )  # fmt: skip
    return out
