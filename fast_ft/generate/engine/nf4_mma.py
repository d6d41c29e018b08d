"""A product of few rows with 4-bit weights, on tensor cores: nf4_mma.cu for one cut, its compilation and its launch.

For compute capability 8.0 and up. Shapes: M rows of x, K inputs, N outputs, R ranks of the LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fast_ft.generate.engine.cuda_kernel import CudaKernel
from fast_ft.generate.engine.nvrtc import compiled
from fast_ft.models.nf4 import Order, code_bits

NAME = "the CUDA kernel"
MULTIPLE, CAPABILITY = 64, (8, 0)  #: as nf4_linear.Way's
NEWEST: tuple[int, int] | None = None
_FEWEST = 3  #: stages: what is multiplied, what comes next, what is under way
_RESERVED = 1024  #: bytes of shared memory that the driver keeps in front of a block's own


class Shares(Protocol):
    """What a product is dealt out in: tiles of outputs, chunks of columns."""

    @property
    def tile(self) -> int:
        """Outputs of a block."""

    @property
    def chunk(self) -> int:
        """Columns in a stage."""


@dataclass(frozen=True)
class Cut:
    """How a block divides its work; the names in nf4_mma.cu are the same, in capitals."""

    mt: int  #: eights of rows
    g: int  #: sixteens of outputs in a warp
    nw: int  #: warps along the outputs
    kg: int  #: groups of warps, 64 columns each
    stages: int  #: chunks under way
    entry: int = 256  #: bytes of an entry of the codes' table: 256, or 128 where kg is 1

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
        stage = self.tile * 32 + self.mt * 1024 + self.tile * 4  # of one group
        return 256 * self.entry + self.stages * self.kg * stage


def order_for(rows: int) -> Order:
    """Return the order in which `product` wants that many rows of x."""
    return Order.ROWS


def source(cut: Cut, dtype: str) -> str:
    """Return the CUDA C++ for a cut and "float16" or "bfloat16"."""
    given = dict(zip(("MT", "G", "NW", "KG", "STAGES", "ENTRY"), astuple(cut), strict=True))
    head = "".join(f"#define {name} {value}\n" for name, value in given.items()) + code_defines(dtype)
    return head + Path(__file__).with_name("nf4_mma.cu").read_text(encoding="utf-8")


def code_defines(dtype: str) -> str:
    """Return the lines that tell a kernel how numbers of a dtype are named, what codes are, and where its memory is."""
    kind, bits = "f16" if dtype == "float16" else "bf16", ", ".join(map(str, code_bits(dtype)))
    return f'#define KIND "{kind}"\n#define BASE "{_RESERVED}"\n#define CODE_BITS {bits}\n'


@functools.cache
def kernel(cut: Cut, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """Return the kernel for a cut, compiled and loaded."""
    capability = torch.cuda.get_device_capability(device)
    cubin = compiled(source(cut, str(dtype).removeprefix("torch.")), (), capability)
    early = capability >= (9, 0)
    return CudaKernel(cubin, "product", device, threads=cut.threads, shared=cut.shared, early=early)


@functools.cache
def parts_of(tiles: int, chunks: int, blocks: int) -> int:
    """Return into how many parts at most a tile's chunks fall where all tiles' are dealt out evenly, in order."""

    def owner(chunk: int) -> int:
        return ((chunk + 1) * blocks - 1) // (tiles * chunks)

    return max(owner((tile + 1) * chunks - 1) - owner(tile * chunks) for tile in range(tiles)) + 1


def cut_for(rows: int, device: torch.device) -> Cut:
    """Return how work is cut for that many rows on a card."""
    return fitting(rows, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def fitting(rows: int, room: int) -> Cut:
    """Return how work is cut for that many rows where a block may have `room` bytes of shared memory."""
    eights = -(-rows // 8)
    if eights > 8:
        eights = -(-eights // 4) * 4
        cuts = [Cut(eights, 2, 8, 1, 0), Cut(eights, 2, 8, 1, 0, 128), Cut(eights, 2, 4, 1, 0, 128)]
    else:
        cuts = [Cut(eights, 4, 4, 2, 0), Cut(eights, 4, 4, 1, 0, 128)]
    for cut in cuts:
        stages = (room - cut.shared) // (replace(cut, stages=1).shared - cut.shared)
        if stages >= _FEWEST:
            return replace(cut, stages=min(stages, 5 if eights <= 2 else 4))
    raise ValueError(f"{room} bytes of shared memory are too few for {rows} rows")


def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def blocks_for(cut: Shares, outputs: int, inputs: int, device: torch.device) -> int:
    """Return how many blocks share a product: the fewest with as small a largest share as all multiprocessors."""
    chunks = -(-outputs // cut.tile) * -(-inputs // cut.chunk)
    share = -(-chunks // processors_of(device))
    return -(-chunks // share)


def dealt(cut: Shares, outputs: int, inputs: int, device: torch.device, blocks: int = 0) -> tuple[int, int]:
    """Return how many blocks share a product, at most `blocks` or as blocks_for says, and how many parts it has."""
    tiles, chunks = -(-outputs // cut.tile), -(-inputs // cut.chunk)
    blocks = min(blocks or blocks_for(cut, outputs, inputs, device), tiles * chunks)
    return blocks, parts_of(tiles, chunks, blocks)


def room_for(x_MK: Tensor, outputs: int, parts: int) -> Tensor:
    """Return where a product goes: MN, or fp32 parts of it, (parts, M, N)."""
    if parts == 1:
        return x_MK.new_empty(len(x_MK), outputs)
    return x_MK.new_empty(parts, len(x_MK), outputs, dtype=torch.float32)


def parts_for(rows: int, outputs: int, inputs: int, device: torch.device) -> int:
    """Return in how many parts `product` leaves a product."""
    return dealt(cut_for(rows, device), outputs, inputs, device)[1]


def compare(x_MK: Tensor, words: Tensor, scales: Tensor, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return x's products as the kernel for its rows makes them: whole, and in parts that end within chunks' rows."""
    cut = cut_for(len(x_MK), x_MK.device)
    return {f"{cut}, {n} blocks": product(x_MK, words, scales, None, None, cut, n) for n in (1, 3, 5)}


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

    `words` is (N, K / 8) int32 as bitsandbytes packs, `scales` (K / 64, N) as nf4.pack_scales returns them. K is a
    multiple of 64, R of 16, N of 4; `xa_MR` None is no LoRA.
    """
    (rows, inputs), outputs = x_MK.shape, len(words)
    cut = cut or cut_for(rows, x_MK.device)
    blocks, parts = dealt(cut, outputs, inputs, x_MK.device, blocks)
    out = room_for(x_MK, outputs, parts)
    xa, b, ranks = (x_MK, x_MK, 0) if xa_MR is None or b_NR is None else (xa_MR, b_NR, xa_MR.shape[1])
    kernel(cut, x_MK.dtype, x_MK.device)(
        (blocks, 1), x_MK, words, scales, xa, b, out, rows, outputs, inputs, x_MK.stride(0), xa.stride(0), ranks, parts,
    )  # fmt: skip
    return out
