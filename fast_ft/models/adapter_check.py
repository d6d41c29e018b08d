"""Is the adapter that was loaded the one that was trained?

Training stores the log-probabilities of the trained tokens of three rows beside the adapter. Generation, with its
fresh base model, computes them again and compares: a wrong base, other quantisation, a scale lost on the way or
another prompt template shows as a difference, before any answer is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from fast_ft.common import out_of_memory, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models.loaders.base import LoadedModel

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "selfcheck.json"
ROWS = 3
#: Tokens of a pass over several rows, padding included: as many as decoding's own passes over prompts hold.
_PASS_TOKENS = 2048
#: Mean absolute difference allowed, in nats per token, by the dtype that the base computes in.
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


class StoredRow(BaseModel):
    """One training row, and what the trained model said of its trained tokens."""

    input_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=1_000_000)]
    start: Annotated[int, Field(ge=1)]
    log_probabilities: list[float]

    @model_validator(mode="after")
    def _fits(self) -> StoredRow:
        if len(self.input_ids) - self.start != len(self.log_probabilities):
            raise ValueError("there is not one log-probability for each trained token")
        return self


class StoredCheck(BaseModel):
    """The content of selfcheck.json, which may come from outside, as the adapter may."""

    dtype: Literal["float32", "float16", "bfloat16"]
    rows: Annotated[list[StoredRow], Field(min_length=1, max_length=ROWS)]


def log_probabilities(
    model: PeftModel, ids: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int
) -> list[list[float]]:
    """Return log p(ids[t] | ids[<t]) for t from each row's start on, in nats: lists as long as what follows the starts.

    The model must be in evaluation mode. One forward pass over all rows. They are padded on the right, where causal
    attention does not look: so no mask is needed, and kernels without one are the ones that training used.
    """
    import torch

    device = next(model.parameters()).device
    width = max(len(row) for row in ids)
    padded = [[*row, *[pad_id] * (width - len(row))] for row in ids]
    position_BL = torch.arange(width, device=device).expand(len(ids), width)
    # Of several rows, only the logits that are asked for are computed: the memory beside a decoding pool is scarce.
    wanted = sorted({at for row, start in zip(ids, starts, strict=True) for at in range(start - 1, len(row) - 1)})
    few = {"logits_to_keep": torch.tensor(wanted, device=device)} if len(ids) > 1 else {}
    place = {at: index for index, at in enumerate(wanted if few else range(width))}
    with torch.no_grad():
        logits_BKV = model(input_ids=torch.tensor(padded, device=device), position_ids=position_BL, **few).logits
        values = []
        for logits_KV, row, start in zip(logits_BKV, ids, starts, strict=True):
            first = place[start - 1]
            logits_TV = logits_KV[first : first + len(row) - start].float()
            target_T = torch.tensor(list(row[start:]), device=device)
            values.append(torch.log_softmax(logits_TV, dim=-1).gather(1, target_T[:, None])[:, 0].tolist())
    return values


def log_probabilities_of(
    loaded: LoadedModel,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    pad_id: int,
    most_tokens: int | None = None,
    exactly: bool = True,
) -> list[list[float]]:
    """Return what `log_probabilities` does, in as few passes as the model gives the same numbers in.

    On a GPU a pass over one row takes about as long as one over four, so rows of up to `most_tokens` (default:
    _PASS_TOKENS), padding included, share one. On a CPU 4-bit products depend on how many rows they take, Unsloth's
    forward takes no list of logits to keep, and on the general way a row's rope may depend on its neighbours: there
    each row has a pass of its own. Where `exactly` is False, rows share passes on a CPU too: 4-bit products then differ
    by some 1e-4.
    """
    most = (most_tokens or _PASS_TOKENS) if _may_share_passes(loaded, exactly) else 0
    values: dict[int, list[float]] = {}
    for group in _groups([len(row) for row in ids], most):
        rows, begins = [ids[index] for index in group], [starts[index] for index in group]
        values |= zip(group, log_probabilities(loaded.model, rows, begins, pad_id), strict=True)
    return [values[index] for index in range(len(ids))]


def _may_share_passes(loaded: LoadedModel, exactly: bool) -> bool:
    return (loaded.device == "cuda" or not exactly) and loaded.backend != "unsloth" and loaded.general is None


def _groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return the rows' indices, rows of like length together, in groups of at most `most` padded tokens each."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def store(folder: Path, loaded: LoadedModel, rows: Sequence[EncodedRow], pad_id: int) -> None:
    """Write the log-probabilities of the first three rows beside the adapter."""
    loaded.model.eval()
    entries = []
    for row in rows[:ROWS]:
        start = first_trained(row)
        values = _measured(loaded, row.input_ids, start, pad_id)
        ids = row.input_ids[: start + len(values)]
        entries.append({"input_ids": ids, "start": start, "log_probabilities": values})
    content = {"dtype": loaded.dtype, "backend": loaded.backend, "rows": entries}
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")


def read(folder: Path) -> StoredCheck:
    """Return selfcheck.json of an adapter's folder. Raises InputError where it cannot be read."""
    path, remedy = folder / FILE, "Restore the file, or run the recipe again, which makes a missing one again."
    if not path.is_file():
        raise InputError(f"{path} is not there. {remedy}")
    try:
        return StoredCheck.model_validate(untrusted_files.json_object(path))
    except (OSError, ValueError):  # ValidationError and InputError are ValueErrors
        raise InputError(f"{path}: cannot be read as what training writes there. {remedy}") from None


def verify(folder: Path, loaded: LoadedModel, pad_id: int) -> float:
    """Compare a loaded adapter with what training stored in its folder; return the mean absolute difference.

    It is in nats per token. The tolerance is the coarser one of the two dtypes, since an adapter may be trained on one
    card and used on another.

    Raises:
        InputError: the difference is over the tolerance, or selfcheck.json cannot be read or is another model's.
    """
    stored = read(folder).model_dump()
    if max(max(entry["input_ids"]) for entry in stored["rows"]) >= loaded.model.config.vocab_size:
        raise InputError(f"{folder / FILE}: holds tokens that the base model has not: this adapter is another model's.")
    differences: list[float] = []
    ids, starts = ([entry[key] for entry in stored["rows"]] for key in ("input_ids", "start"))
    for entry, now in zip(stored["rows"], log_probabilities_that_fit(loaded, ids, starts, pad_id), strict=True):
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


def log_probabilities_that_fit(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int, exactly: bool = True
) -> list[list[float]]:
    """Return what `log_probabilities_of` does; where memory is short, of a row's first tokens only."""
    try:
        return log_probabilities_of(loaded, ids, starts, pad_id, exactly=exactly)
    except Exception as error:
        if not out_of_memory.is_short(error):
            raise
    out_of_memory.release()
    return [_measured(loaded, row, start, pad_id) for row, start in zip(ids, starts, strict=True)]


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


def first_trained(row: EncodedRow) -> int:
    """Return the place of a row's first token that is trained: never 0, since nothing comes before that."""
    return next(i for i, label in enumerate(row.labels) if i > 0 and label != IGNORE_INDEX)
