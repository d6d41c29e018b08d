"""A compiled CUDA kernel, loaded into torch's context of a card and launched on torch's current stream.

Through the driver's own library: launches are captured by CUDA graphs like torch's.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_SHARED = 8  #: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BYTES, _PROMOTION = 0, 3  #: CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_L2_PROMOTION_L2_256B


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


_EARLY = _Attribute(id=6, value=1)  #: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class TensorMap(ctypes.Structure):
    """CUtensorMap."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


class CudaKernel:
    """The function `name` of a cubin on one card; its blocks have `threads` threads and `shared` bytes of memory.

    `early`: it is launched while the launch before it ends, and waits for that one's end itself (griddepcontrol).
    """

    def __init__(
        self, cubin: bytes, name: str, device: torch.device, *, threads: int, shared: int, early: bool = False
    ) -> None:
        self.threads, self.shared, self._early = threads, shared, early
        self._context = _context(torch.cuda.current_device() if device.index is None else device.index)
        self._enter()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()  # never unloaded: a graph may hold it
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, _MOST_SHARED, shared))

    def __call__(self, blocks: tuple[int, int], *given: Tensor | int | TensorMap) -> None:
        """Launch that many blocks (x, y); an int is passed as C's int, a tensor as its address, a map as its bytes."""
        self._enter()
        values = [_passed(each) for each in given]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        config = _Config(*blocks, 1, self.threads, 1, 1, self.shared, stream, ctypes.pointer(_EARLY), int(self._early))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))

    def _enter(self) -> None:
        """Give a thread that has used no card so far the card's context."""
        current = ctypes.c_void_p()
        _check(_driver().cuCtxGetCurrent(ctypes.byref(current)))
        if not current:
            _check(_driver().cuCtxSetCurrent(self._context))


def _passed(value: Tensor | int | TensorMap) -> ctypes._CData:
    if isinstance(value, TensorMap):
        return value
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())


def tensor_map(memory: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """Return the map of a tensor's bytes by which the copy engine of 9.0 and up takes boxes of them (TMA).

    `shape` and `box` begin with the dimension without gaps; `strides`, in bytes, are those of the others. What a box
    has beyond the shape is zero. RuntimeError where the driver refuses.
    """
    count = len(shape)
    raw = (ctypes.c_ubyte * 192)()
    made = TensorMap.from_buffer(raw, -ctypes.addressof(raw) % 64)  # the driver writes to multiples of 64 alone
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(made), _BYTES, count, ctypes.c_void_p(memory.data_ptr()), (ctypes.c_uint64 * count)(*shape),
            (ctypes.c_uint64 * (count - 1))(*strides), (ctypes.c_uint32 * count)(*box),
            (ctypes.c_uint32 * count)(*[1] * count), 0, 0, _PROMOTION, 0,
        )
    )  # fmt: skip
    return made


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """Return the context that torch uses on a card."""
    torch.cuda.init()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(device), index))
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {text.value.decode() if text.value else status}")
