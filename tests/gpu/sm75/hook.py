"""Let Triton compile as for a T4 on a newer card. Import before any kernel is compiled, in a process of its own.

    source -> LLVM   with compute capability 7.5: no tensor cores, no asynchronous copies, Turing's layouts
    LLVM -> PTX      with .target sm_75, so that nothing newer can slip in
    PTX -> code      by ptxas for the card at hand, which may run PTX of any older target

torch's own attention and cuBLAS's products stay those of the card at hand: their sm_75 code runs on a T4 only.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["TRITON_OVERRIDE_ARCH"] = "sm75"
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-sm75-")  # never beside the card's own kernels

import torch
from triton import knobs

from tests.gpu.sm75.inventory import Kernel, kernel_of

_CAPABILITY = 75
_SHARED_BYTES = 64 * 1024  #: that a program may have on a T4
_NEWER = ("wgmma", "cp.async", "mma.sync", "bf16x2")  #: ldmatrix is not: the PTX ISA has it from sm_75 on
_REAL = torch.cuda.get_device_capability()

#: Kernels that were compiled for 7.5 in this process, and launched.
seen: set[Kernel] = set()


def _stages(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> Any:
    """Change what Triton does after LLVM; without arguments Triton asks for what a cached kernel depends on."""
    if backend is None:
        return "sm75", "sm75"
    assert capability == _CAPABILITY, capability

    def ptx(source: Any, metadata: Any) -> str:
        text: str = backend.make_ptx(source, metadata, options, _CAPABILITY)  # Triton would take the card's own here
        newer = [word for word in _NEWER if word in text]
        assert ".target sm_75" in text and not newer, f"{metadata['name']} needs a newer card: {newer}"
        assert metadata["shared"] <= _SHARED_BYTES, f"{metadata['name']}: {metadata['shared']} bytes of shared memory"
        return text

    stages["ptx"] = ptx
    major, minor = _REAL
    stages["cubin"] = lambda source, metadata: backend.make_cubin(source, metadata, options, 10 * major + minor)
    return None


def _compiled(*_: Any, fn: Any, **__: Any) -> None:
    seen.add(kernel_of(fn.module, fn.name))


knobs.runtime.add_stages_inspection_hook = _stages
knobs.runtime.jit_post_compile_hook = _compiled


def pretend_t4() -> None:
    """Let torch name a T4's compute capability, so that dtypes and decoding's way are a T4's.

    bitsandbytes asks the driver itself, so its own kernels stay the card's.
    """
    torch.cuda.get_device_capability = lambda *_: (7, 5)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
