"""CUDA C++ compiled to a card's machine code by NVRTC, the compiler library that torch brings: no nvcc, no headers.

What is compiled is kept between runs of a machine, under the digest of all that it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fast_ft.common import atomic_files, environment
from fast_ft.common.errors import InputError

_MAJORS = (13, 12)  #: of CUDA, for which torch 2.10 to 2.13 are built


def compiled(
    source: str, options: Sequence[str], capability: tuple[int, int], *, portable: bool = False, own: bool = False
) -> bytes:
    """Return a source's machine code for cards of this compute capability; `portable`: PTX, which newer ones take too.

    `own` allows instructions that only cards of this capability have. RuntimeError, with NVRTC's log, if it does not
    compile; OSError where there is no NVRTC.
    """
    library = _library()
    target = f"{'compute' if portable else 'sm'}_{capability[0]}{capability[1]}{'a' if own else ''}"
    wanted = [f"--gpu-architecture={target}", "--std=c++17", "-default-device", *options]
    asked = "\0".join([source, *wanted, _version(library)])
    kept = folder() / f"{hashlib.sha256(asked.encode()).hexdigest()}.cubin"
    if (cubin := _read(kept)) is None:
        cubin = _compile(library, source, wanted, "PTX" if portable else "CUBIN")
        with contextlib.suppress(InputError):  # a disk that refuses costs the next run two seconds
            atomic_files.write_bytes(kept, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def folder() -> Path:
    """Return where compiled kernels are kept."""
    return environment.kernel_folder()


def _read(path: Path) -> bytes | None:
    """Return a kept cubin if it is what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


@functools.cache
def _library() -> ctypes.CDLL:
    """Load NVRTC: that of torch's own packages first, then whichever the system finds. OSError if there is none."""
    import torch

    own = int((torch.version.cuda or "0").split(".")[0])
    majors = sorted(_MAJORS, key=lambda major: major != own)
    names = [f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}" for major in majors]
    packaged = [path for name in names for entry in sys.path for path in Path(entry or ".").glob(f"nvidia/*/*/{name}")]
    for path in packaged:
        with contextlib.suppress(OSError):
            for builtins in path.parent.glob(f"{'' if sys.platform == 'win32' else 'lib'}nvrtc-builtins*"):
                ctypes.CDLL(str(builtins))  # which NVRTC asks for by name alone
            return ctypes.CDLL(str(path))
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("NVRTC, which torch for CUDA brings, was not found")


def _version(library: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _compile(library: ctypes.CDLL, source: str, options: Sequence[str], kind: str) -> bytes:
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            log = _bytes(library, program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise RuntimeError(f"NVRTC: {log.rstrip(bytes(1)).decode(errors='replace').strip()}")
        return _bytes(library, program, library[f"nvrtcGet{kind}Size"], library[f"nvrtcGet{kind}"])
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(
    library: ctypes.CDLL, program: ctypes.c_void_p, size: ctypes._FuncPointer, read: ctypes._FuncPointer
) -> bytes:
    length = ctypes.c_size_t()
    _check(library, size(program, ctypes.byref(length)))
    content = ctypes.create_string_buffer(length.value)
    _check(library, read(program, content))
    return content.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
