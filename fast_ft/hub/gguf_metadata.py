"""What a .gguf file says of itself, and its tensors, read through the `gguf` package. It may say anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.errors import InputError

if TYPE_CHECKING:
    import numpy


def library(what: str, remedy: str = "") -> Any:
    """Return the gguf package. Raises InputError where it is not installed: `what` needs it."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(
            f"{what} needs the gguf package, which is not installed: python -m pip install gguf==0.19.0{remedy}"
        ) from None
    return gguf


class Metadata:
    """One open file. `tensors` are the `gguf` package's: name, shape (the innermost size first), n_elements."""

    def __init__(self, path: Path, reader: Any, remedy: str) -> None:
        self.path, self._reader, self.remedy = path, reader, remedy
        self.tensors: list[Any] = reader.tensors

    @classmethod
    def open(cls, path: Path, remedy: str) -> Metadata:
        """Return an open file. Raises InputError where it is none, is cut short, or the `gguf` package is missing."""
        gguf = library(str(path), f". {remedy}")
        try:
            return cls(path, gguf.GGUFReader(path), remedy)
        except Exception as error:  # of any kind: the package does not expect a file that is cut short
            words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"{path} is no readable .gguf file ({words}): copy or download it again") from None

    @property
    def architecture(self) -> str:
        """Return general.architecture, such as "llama"."""
        return self.text("general.architecture") or "unknown"

    def get(self, key: str) -> Any:
        """Return a value, or None where the file has no such key or it cannot be read."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, KeyError):  # UnicodeDecodeError too
            raise InputError(f"{self.path}: its {key} is garbled: copy or download it again") from None

    def text(self, key: str) -> str | None:
        """Return a text, or None."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> float | None:
        """Return a number, or None."""
        value = self.get(key)
        return value if isinstance(value, int | float) else None

    def needed(self, key: str) -> float:
        """Return a number. Raises InputError where the file has none of that key."""
        value = self.number(key)
        if value is None:
            raise InputError(f"{self.path}: it says no {key}, which a model needs. {self.remedy}")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; [] where there is none."""
        value = self.get(key)
        return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else []

    def values(self, tensor: Any) -> numpy.ndarray:
        """Return a tensor's numbers in fp32, the outermost size first. InputError for an unknown quantisation."""
        import gguf

        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf package cannot "
                f"undo. {self.remedy}"
            ) from None
