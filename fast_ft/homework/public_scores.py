"""What JudgeBoi said of a run: submissions.json in the run's folder.

{"submissions": [{"score", "at": time, "pred": digest of the pred.json that was sent}]}. Times are written in UTC; one
without an offset, as somebody may write it by hand, is Taipei's.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fast_ft.common import atomic_files, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.run.folder import RunDir

FILE = "submissions.json"
TAIPEI = dt.timezone(dt.timedelta(hours=8))
_REMEDY = "You can mend it, or delete it and note the scores again with --public-score."


class _Submission(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    score: Annotated[float, Field(ge=0, le=10)]
    at: Annotated[str, AfterValidator(lambda text: moment(text) and text)]
    pred: str | None = None


class _Submissions(BaseModel):
    model_config = ConfigDict(strict=True)

    submissions: list[_Submission] = []


def add(folder: RunDir, score: float, at: str | None = None) -> None:
    """Note a public score. `at`: ISO, Taipei's time if it names none; now where it is None. Raises InputError."""
    if not (math.isfinite(score) and 0 <= score <= 10):
        raise InputError(f"--public-score {score}: JudgeBoi's scores go from 0 to 10")
    if not folder.pred.is_file():
        raise InputError(f"{folder.root} has no pred.json, so none of its was judged")
    entry = {
        "score": score,
        "at": _said_at(at).astimezone(dt.UTC).isoformat(timespec="seconds"),
        "pred": atomic_files.sha256_file(folder.pred),
    }
    noted = sorted([*submissions(folder), entry], key=lambda each: moment(each["at"]))
    atomic_files.write_json(folder.root / FILE, {"submissions": noted})


def day(time: dt.datetime) -> dt.date:
    """Return JudgeBoi's day: it ends at 23:59 in Taipei, so the last minute belongs to the next."""
    return (time.astimezone(TAIPEI) + dt.timedelta(minutes=1)).date()


def moment(text: str) -> dt.datetime:
    """Return an ISO time, Taipei's where it names no offset. InputError for what is none, and for other centuries."""
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or not 2000 <= found.year < 2100:
        raise InputError(f'{text!r} is no time: write it as "2025-04-05 21:30" (Taipei\'s time), or with an offset')
    return found if found.tzinfo else found.replace(tzinfo=TAIPEI)


def submissions(folder: RunDir) -> list[dict[str, Any]]:
    """Return the public scores noted for a run, oldest first. InputError where submissions.json is damaged."""
    path = folder.root / FILE
    if not path.exists():
        return []
    content = untrusted_files.json_object(path, remedy=_REMEDY)
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # a note of one's own is written again too
        found = _Submissions.model_validate(content).model_dump()["submissions"]
        return sorted(found, key=lambda each: moment(each["at"]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = escaped(".".join(map(str, first["loc"])))
        raise InputError(f"{path}: {place}: {escaped(first['msg'])}. {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {escaped(str(error))}. {_REMEDY}") from None


def _said_at(at: str | None) -> dt.datetime:
    now = dt.datetime.now(dt.UTC)
    if at is None:
        return now
    try:
        said = moment(at)
    except InputError as error:
        raise InputError(f"--at {error}") from None
    if said > now + dt.timedelta(minutes=5):
        raise InputError(f"--at {at}: that time has not come yet")
    return said
