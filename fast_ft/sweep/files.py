"""A sweep's files, each read back with the types that its readers rely on: sweep.json, clock.json, a trial's facts.

A sweep folder can come from another machine, and a power cut or an editor can damage a file in it. Every refusal says
how to go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fast_ft.common import atomic_files, untrusted_files
from fast_ft.common.errors import InputError

_MOST = 256 << 20  #: bytes of one file; a hundred trials take one MiB
_SWEEP_REMEDY = (
    "Restore it from a copy, or delete it: the same command then writes it again from study.journal, which holds the "
    "trials."
)
_CLOCK_REMEDY = (
    'Write {"seconds": N} into it, N being the seconds used so far (sweep.json has the last figure), or delete it: the '
    "hours then count from zero."
)

Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]


class _Content(BaseModel):
    """Keys that are not named here are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Validation(_Content):
    file: str
    prompts: list[str]


class _Sweep(_Content):
    recipe: dict[str, Any]
    recipe_file: str
    validation: _Validation


class _Clock(_Content):
    seconds: NotNegative


class _Took(_Content):
    """All four keys, and no other: cost_estimate.Measured takes them by name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    steps: NotNegative
    answers: NotNegative
    all: NotNegative
    load: NotNegative = 0.0


class _Proof(_Content):
    rows: list[str]
    in_validation: list[str]
    in_test: list[str]


class _Trial(_Content):
    """What any trial's record may hold."""

    value: Number | None = None
    stages: dict[str, Number] = {}
    reason: str = ""
    folder: str | None = None
    training: str | None = None
    trained_in: str | None = None
    priced: Number | None = None
    seconds: dict[str, Number] = {}
    minutes: Number = 0.0


class _Finished(_Trial):
    state: Literal["finished"]
    value: Number
    folder: str
    scores: dict[str, Number | None]
    minutes: Number
    work: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]
    took: _Took
    proof: _Proof


class _Repeat(_Trial):
    state: Literal["finished"]
    value: Number
    folder: str
    repeats: int


class _Stopped(_Trial):
    state: Literal["stopped early"]
    so_far: Number


class _NoValue(_Trial):
    state: Literal["no result", "no recipe", "not begun", "repeat"]


_SWEEP: TypeAdapter[Any] = TypeAdapter(_Sweep)
_INPUTS: TypeAdapter[Any] = TypeAdapter(dict[str, str])
_CLOCK: TypeAdapter[Any] = TypeAdapter(_Clock)
_BY_STATE: dict[Any, TypeAdapter[Any]] = {"finished": TypeAdapter(_Finished), "stopped early": TypeAdapter(_Stopped)}
_REPEAT: TypeAdapter[Any] = TypeAdapter(_Repeat)
_NO_VALUE: TypeAdapter[Any] = TypeAdapter(_NoValue)


def read_sweep(path: Path) -> dict[str, Any]:
    """Return sweep.json's content. Raises InputError."""
    content = untrusted_files.json_object(path, _MOST, _SWEEP_REMEDY)
    _check(_SWEEP, content, str(path), _SWEEP_REMEDY)
    return content


class SweepFile:
    """sweep.json as it grows. `check` is called before each write, and may refuse it."""

    def __init__(self, path: Path, check: Callable[[], object] = lambda: None) -> None:
        self.path, self._check = path, check

    def update(self, **values: Any) -> None:
        """Write these keys; the others stay."""
        self._check()
        there = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        atomic_files.write_json(self.path, there | values)


def read_clock(path: Path) -> float:
    """Return the seconds that clock.json says were used. Raises InputError."""
    content = untrusted_files.json_object(path, remedy=_CLOCK_REMEDY)
    _check(_CLOCK, content, str(path), _CLOCK_REMEDY)
    return float(content["seconds"])


def check_inputs(found: object, path: Path, remedy: str) -> None:
    """Raise InputError where the trials' inputs in the journal at `path` are no {name: digest}."""
    _check(_INPUTS, found, f"{path}: inputs", remedy)


def check_record(record: dict[str, Any], path: Path, remedy: str) -> None:
    """Raise InputError where a trial's record, read from the journal at `path`, lacks what the sweep needs."""
    kind = _REPEAT if record.get("repeats") is not None else _BY_STATE.get(str(record["state"]), _NO_VALUE)
    _check(kind, record, f"{path}: trial {record['number']}", remedy)


def _check(kind: TypeAdapter[Any], content: object, name: str, remedy: str) -> None:
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # as sweep.json is written
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: holds what no JSON file can ({error}). {remedy}") from None
    try:
        kind.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{name}: {place[:200]}: {first['msg']}; not as a sweep writes it. {remedy}") from None
