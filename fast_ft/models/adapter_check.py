"""Is the adapter that was loaded the one that was trained?

Training stores the log-probabilities of the trained tokens of three rows beside the adapter. Generation, with its
fresh base model, computes them again and compares: a wrong base, other quantisation, a scale lost on the way or
another prompt template shows as a difference, before any answer is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from fast_ft.common import out_of_memory, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models.loaders.base import LoadedModel

FILE = "selfcheck.json"
ROWS = 3
#: Mean absolute difference allowed, in nats a token, by the dtype that the base computes in.
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


class _Row(BaseModel):
    input_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=1_000_000)]
    start: Annotated[int, Field(ge=1)]
    log_probabilities: list[float]

    @model_validator(mode="after")
    def _fits(self) -> _Row:
        if len(self.input_ids) - self.start != len(self.log_probabilities):
            raise ValueError("there is not one log-probability for each trained token")
        return self


class _Stored(BaseModel):
    """selfcheck.json, which comes with an adapter from wherever that comes from."""

    dtype: Literal["float32", "float16", "bfloat16"]
    rows: Annotated[list[_Row], Field(min_length=1, max_length=ROWS)]


def log_probabilities(
    model: Any, ids: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int
) -> list[list[float]]:
    """Return log p(ids[t] | ids[<t]) for t from each row's start on, in nats; rows are padded on the left.

    The model must be in evaluation mode. One forward pass over all rows.
    """
    import torch

    device = next(model.parameters()).device
    width = max(len(row) for row in ids)
    padded = [[pad_id] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    mask_BL = torch.tensor(mask, device=device)
    position_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits_BLV = model(
            input_ids=torch.tensor(padded, device=device),
            # rows of one length need no mask, and kernels without one are the ones that training used
            attention_mask=mask_BL if any(len(row) < width for row in ids) else None,
            position_ids=position_BL,
        ).logits
        values = []
        for index, (row, start) in enumerate(zip(ids, starts, strict=True)):
            shift = width - len(row)
            logits_TV = logits_BLV[index, shift + start - 1 : width - 1].float()
            target_T = torch.tensor(list(row[start:]), device=device)
            values.append(torch.log_softmax(logits_TV, dim=-1).gather(1, target_T[:, None])[:, 0].tolist())
    return values


def store(folder: Path, loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int) -> None:
    """Write the log-probabilities of the first three rows beside the adapter."""
    loaded.model.eval()
    entries = []
    for row in rows[:ROWS]:
        start = _start(row)
        values = _measured(loaded, row.input_ids, start, pad_id)
        ids = row.input_ids[: start + len(values)]
        entries.append({"input_ids": ids, "start": start, "log_probabilities": values})
    content = {"dtype": loaded.dtype, "backend": loaded.backend, "rows": entries}
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")


def verify(folder: Path, loaded: LoadedModel, pad_id: int) -> float:
    """Return the mean absolute difference in nats a token; InputError where it is over the tolerance.

    The tolerance is the coarser one of the two dtypes, for an adapter may be trained on one card and used on another.
    """
    try:
        stored = _Stored.model_validate(untrusted_files.json_object(folder / FILE)).model_dump()
    except (OSError, ValueError) as error:  # ValidationError and InputError are ValueErrors
        raise InputError(f"{folder / FILE}: cannot be read ({error}). Train again, or restore the file.") from None
    if max(max(entry["input_ids"]) for entry in stored["rows"]) >= loaded.model.config.vocab_size:
        raise InputError(f"{folder / FILE}: holds tokens that the base model has not: this adapter is another model's.")
    differences: list[float] = []
    for entry in stored["rows"]:
        now = _measured(loaded, entry["input_ids"], entry["start"], pad_id)
        differences += [abs(a - b) for a, b in zip(now, entry["log_probabilities"], strict=False)]
    mean = sum(differences) / len(differences)
    allowed = max(TOLERANCE[stored["dtype"]], TOLERANCE[loaded.dtype])
    if not mean <= allowed:  # a NaN fails too
        raise InputError(
            f"{folder}: this adapter is not what was trained. On {len(stored['rows'])} training rows the trained "
            f"tokens' log-probabilities differ from those stored after training by {mean:.4f} nat on average; "
            f"{allowed} is allowed in {loaded.dtype}. Is it the same base model, quantisation and tokenizer?"
        )
    return mean


def _measured(loaded: LoadedModel, ids: Sequence[int], start: int, pad_id: int) -> list[float]:
    """Return a row's log-probabilities from `start` on; of its first tokens only where memory does not do for all."""
    tokens = len(ids) - start
    while True:
        try:
            return log_probabilities(loaded.model, [ids[: start + tokens]], [start], pad_id)[0]
        except Exception as error:
            if not out_of_memory.is_short(error) or tokens == 1:
                raise
        out_of_memory.release()  # outside of the handler, whose error holds the activations
        tokens //= 2


def _start(row: EncodedRow) -> int:
    return next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
