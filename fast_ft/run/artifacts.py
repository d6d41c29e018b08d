"""A run's files read back: manifest, pred, answers and scores.json, log.jsonl, each with the types that it promises.

A run folder can come from elsewhere, and a file in it can be cut off or edited. So each is checked for what its readers
rely on; what they do not rely on may be anything. The content is returned as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

MOST = 256 << 20  #: bytes of one file; 150 answers take one MiB

Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    """Keys that are not named here are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Turn(_Part):
    role: str
    content: str


class _Entry(_Part):
    input: Annotated[list[_Turn], Field(min_length=1)]
    output: Annotated[list[str], Field(min_length=1)]


class _End(_Part):
    tokens: int = 0
    ended: bool = False


class _Line(_Part):
    stage: str
    step: int
    loss: float
    grad_norm: float | None = None
    learning_rate: Number | None = None
    tokens: Number | None = None
    seconds: Number | None = None
    gib: Number | None = None


class _Cells(_Part):
    """Totals over some prompts."""

    count: int = 0
    missing: int | None = None
    mean: Number | None = None
    low: Number | None = None
    high: Number | None = None
    exact_match: Number = 0.0
    rouge_l: Number = 0.0
    chrf: Number = 0.0
    length_ratio: Number = 0.0


class _Judged(_Part):
    """One prompt's."""

    score: Number | None = None
    exact_match: Number | bool | None = None
    reference_score: Number | None = None
    reply: str | None = None
    problem: str | None = None
    swapped: _Judged | None = None


class _Scored(_Cells):
    by_skill: dict[str, _Cells] = {}
    by_difficulty: dict[str, _Cells] = {}
    prompts: dict[str, _Judged] = {}


class _Compared(_Part):
    sentence: str


class _Swapped(_Part):
    order_effect: Number


class _Scores(_Scored):
    kind: Literal["reference", "openai"]
    pred: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # the digest of what was scored
    model: str = ""
    labelled: str = ""
    answered_by: list[str] = []
    scale: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    notes: list[str] = []
    reference_mean: Number | None = None
    baselines: dict[str, Number] = {}
    swapped: _Swapped | None = None
    base: _Scored = _Scored()
    gain: _Compared | None = None
    against: _Compared | None = None


class _Row(_Part):
    id: str
    digest: str


class _Stage(_Part):
    name: str
    ids: list[str]


class _Phase(_Part):
    """What the phases note; a key is there or not, but it is never null."""

    seconds: Number = 0
    finished: str = ""
    backend: str = ""
    dtype: str = ""
    steps: int = 0
    out_of_memory: int = 0
    peak_gib: Number = 0
    first_loss: Number = 0
    last_loss: Number = 0
    why: str = ""
    worthless: str = ""
    stopped_at_step: int = 0
    of_steps: int = 0
    answers: int = 0
    batch_size: int = 1
    decoding_seconds: Number = 0
    cut_by_budget: int = 0
    cut_at: int = 0
    minutes: Number = 0  # of the budget that cut it short
    kind: str = ""
    mean: Number | None = None


class _Environment(_Part):
    python: str = ""
    system: str = ""
    program: str | None = None
    packages: dict[str, str | None] = {}
    gpu: dict[str, str] | None = None


class _Config(_Part):
    quantization_config: dict[str, Any] | None = None


class _Model(_Part):
    name_or_path: str
    commit: str | None = None
    config: _Config = _Config()


class _Tokens(_Part):
    rows: dict[str, str] = {}
    prompts: str | None = None


class _Leakage(_Part):
    hits: list[dict[str, Any]] = []


class _Budget(_Part):
    memory_gib: Number | str | None = None
    train_minutes: Number | None = None
    generate_minutes: Number | None = None


class _Recipe(_Part):
    """Sections only: RunDir.recipe checks their keys, where a run goes on."""

    model: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    train: dict[str, Any] = {}
    data: dict[str, Any] = {}
    judge: dict[str, Any] = {}
    generate: dict[str, Any] = {}
    budget: _Budget = _Budget()
    rules: str | None = None


class _Manifest(_Part):
    recipe: _Recipe = _Recipe()
    recipe_file: str = ""
    recipe_digest: str = ""
    started: str = ""
    phases: dict[str, _Phase] = {}
    rows: list[_Row] = []
    stages: list[_Stage] = []
    digests: dict[str, str] = {}
    leakage: _Leakage = _Leakage()
    notes: list[str] = []
    notes_on_answers: list[str] = []
    environment: _Environment = _Environment()
    resumed: list[dict[str, Any]] = []
    model: _Model | None = None
    tokens: _Tokens = _Tokens()
    plan: dict[str, Any] = {}
    generated_with: dict[str, Any] = {}
    judged_with: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}


_PRED: TypeAdapter[Any] = TypeAdapter(dict[str, _Entry])
_ENDS: TypeAdapter[Any] = TypeAdapter(dict[str, dict[str, _End]])
_LINES: TypeAdapter[Any] = TypeAdapter(list[_Line])
_SCORES: TypeAdapter[Any] = TypeAdapter(_Scores)
_MANIFEST: TypeAdapter[Any] = TypeAdapter(_Manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return manifest.json's content. Raises InputError."""
    content = untrusted_files.json_object(path, MOST, "Restore the file, or delete its folder.")
    return _checked(_MANIFEST, content, path, "run")


def cut_short(phases: dict[str, Any]) -> list[str]:
    """Return what a budget of minutes cut short, one sentence without a full stop each. `phases` are a manifest's."""
    train, generate = phases.get("train") or {}, phases.get("generate") or {}
    said = []
    if train.get("why") == "budget":
        said.append(f"training ended after step {train.get('stopped_at_step')} of {train.get('of_steps')}")
    if cut := generate.get("cut_by_budget"):
        said.append(f"{cut} answers were cut at {generate.get('cut_at')} new tokens or less")
    return said


def read_pred(path: Path) -> dict[str, Any]:
    """Return pred.json's {prompt id: {"input": [{"role", "content"}], "output": [text]}}. Raises InputError."""
    return _checked(_PRED, untrusted_files.json_object(path, MOST, "Generate it again."), path, "generate")


def read_answers(path: Path) -> dict[str, Any]:
    """Return answers.json's {"tuned" or "base": {prompt id: {"tokens", "ended"}}}. Raises InputError."""
    return _checked(_ENDS, untrusted_files.json_object(path, MOST, "Generate it again."), path, "generate")


def read_scores(path: Path) -> dict[str, Any]:
    """Return scores.json's content. Raises InputError."""
    return _checked(_SCORES, untrusted_files.json_object(path, MOST, "Judge the run again."), path, "judge")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return log.jsonl's lines, one a step. Raises InputError."""
    lines: list[Any] = []
    for number, line in enumerate(untrusted_files.text(path, MOST).split("\n"), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error}). Train again.") from None
    return _checked(_LINES, lines, path, "train")


def _checked(kind: TypeAdapter[Any], content: Any, path: Path, command: str) -> Any:
    try:
        kind.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: {place[:200]}: {first['msg']}; not as `{command}` writes it: {command} again"
        ) from None
    return content
