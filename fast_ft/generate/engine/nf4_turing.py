"""A product of up to 64 rows with 4-bit weights, in fp16, for compute capability 7.5: nf4_turing.cu, compiled by NVRTC.

Nothing chooses it: no card of that kind has timed it yet. product_times.py compares and times it beside bitsandbytes'.

Shapes: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from fast_ft.generate.engine.cuda_kernel import CudaKernel
from fast_ft.generate.engine.nvrtc import compiled
from fast_ft.models.nf4 import code_bits, decoder

NAME = "the CUDA kernel for 7.5"
ROWS = 64  #: at most
_SIZES = (2, 4, 8)  #: eights of rows for which it is compiled
_WANTED = 240  #: blocks, so that each of a T4's 40 multiprocessors has several


def source(tiles: int) -> str:
    """Return the CUDA C++ for that many eights of rows."""
    decode = re.sub(r"\$(\d)", r"%\1", decoder(code_bits("float16"), "f16", 1)).replace("\n", "\\n")
    head = f'#define DECODER "{decode}"\n#define TILES {tiles}\n'
    return head + Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")


def size_for(rows: int) -> int:
    """Return the eights of rows of the smallest kernel that takes these rows."""
    return next(size for size in _SIZES if 8 * size >= rows)


@functools.cache
def kernel(tiles: int, device: torch.device) -> CudaKernel:
    """Return the kernel for that many eights of rows, compiled and loaded."""
    cubin = compiled(source(tiles), (), torch.cuda.get_device_capability(device))
    return CudaKernel(cubin, "product", device, threads=128, shared=0)


def product(x_MK: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """Return x times the weights in fp32 parts, (parts, M, N), to be added in their order; all as nf4_mma.product's."""
    (rows, inputs), outputs = x_MK.shape, len(words)
    tiles = -(-outputs // 128)
    parts = max(1, min(8, inputs // 64, round(_WANTED / tiles)))
    out = x_MK.new_empty(parts, rows, outputs, dtype=torch.float32)
    kernel(size_for(rows), x_MK.device)((tiles, parts), x_MK, words, scales, out, rows, outputs, inputs)
    return out
