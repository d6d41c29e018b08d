"""A JSON file of a run folder, checked against a model and handed on as one.

A run folder can come from elsewhere, and a file in it can be cut off or edited. So each file is checked for what its
readers rely on; what they do not rely on may be anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fast_ft.common.errors import InputError

MOST = 256 << 20  #: bytes of one file; 150 answers take one MiB

Number = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")


class Part(BaseModel):
    """An object in a file. Keys that are not named here are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class OpenPart(Part):
    """An object in a file whose other keys are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    def given(self) -> dict[str, Any]:
        """Return the object as the file has it, without defaults."""
        return self.model_dump(exclude_unset=True)


def checked(kind: TypeAdapter[T], content: Any, path: Path, command: str) -> T:
    """Return the content as a `kind`. Raises InputError with the first fault; `command` writes such a file again."""
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: {place[:200]}: {first['msg']}; this is not what `{command}` writes: {command} again"
        ) from None
