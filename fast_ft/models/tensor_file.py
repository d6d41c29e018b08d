"""safetensors files written piece by piece, so that saving takes next to no memory, on a card that is full too.

The library's own writer wants all tensors in the machine's memory at once, which a checkpoint of adapter and optimizer
need not leave room for. What is written is the same, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 16 << 20  #: bytes that come from the card at a time
_LEAST = 1 << 12  #: bytes: where not even these find room, the error is raised
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a tensor will be, before it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any shapes, from whatever device they are on, by their names. The format: safetensors' README.

    Raises:
        MemoryError, torch.OutOfMemoryError: not even pieces of 4 KiB find room.
    """
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    save_each(path, entries, tensors.__getitem__, metadata)


def save_each(
    path: Path, entries: Sequence[Entry], make: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors that `make` returns for the entries' names, one at a time. Raises what `save` does."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    # The widest types first, as the library has them: each tensor is then aligned in a mapped file.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    for entry in ordered:
        begin, end = end, end + entry.size
        kind = _NAMES[str(entry.dtype).removeprefix("torch.")]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in ordered:
            tensor = make(entry.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            for piece in _pieces(tensor):
                file.write(piece)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes, in pieces of PIECE; in smaller ones where there is not enough memory."""
    import torch

    flat = tensor.detach().reshape(-1).view(torch.uint8)
    at, size = 0, PIECE
    while at < len(flat):
        piece = None
        try:
            piece = fetch(flat[at : at + size])
        except Exception as error:
            if not out_of_memory.is_short(error) or size <= _LEAST:
                raise
        if piece is None:  # outside of the handler, whose error holds memory
            out_of_memory.release()
            size //= 8
            continue
        yield memoryview(piece.numpy())
        at += len(piece)


def fetch(piece_N: Tensor) -> Tensor:
    """Return a piece of a tensor on the CPU."""
    return piece_N.cpu()
