"""What is wrong with a recipe's `select`, before any row is read: metrics, conditions, borders, patterns."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fast_ft.common.errors import InputError, nearest
from fast_ft.common.wording import counted
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.conditions import parse_condition
from fast_ft.recipe.schema import METRICS, Condition, Recipe, Reject

Found = tuple[str, tuple[str, ...]]  #: a sentence that begins with a key's dotted path, and the keys it depends on


def problems(recipe: Recipe) -> Iterator[Found]:
    """Yield what is wrong with `select`, and with curriculum.by."""
    select = recipe.select
    yield from conditions("select.where", select.where)
    for metric in select.rank_by:
        yield from _metric(f"select.rank_by.{metric}", metric)
    yield from _metric("curriculum.by", recipe.curriculum.by)
    for metric, borders in select.strata.items():
        key = f"select.strata.{metric}"
        yield from _metric(key, metric)
        if not isinstance(borders, int) and (not borders or list(borders) != sorted(set(borders))):
            yield f"{key}: {list(borders)} are no rising borders; write them as [100, 200]", (key,)
    yield from _patterns(select.reject)
    allowed = policy_ntu_hw5.max_train_rows(recipe)
    if (
        select.take
        and allowed
        and select.take > allowed
        and not (recipe.rules and select.take > policy_ntu_hw5.MAX_ROWS)
    ):
        text = f"select.take: {counted(select.take, 'row')}, where data.max_train_rows allows {allowed}: lower one"
        yield f"{text} or raise the other", ("select.take", "data.max_train_rows")


def conditions(path: str, where: dict[str, Condition]) -> Iterator[Found]:
    """Yield what is wrong with conditions on metrics; `path` is the key that holds them."""
    for metric, condition in where.items():
        key = f"{path}.{metric}"
        if metric not in METRICS:
            yield from _metric(key, metric)
        elif (metric == "ends_cleanly") != isinstance(condition, bool):
            takes = "true or false" if metric == "ends_cleanly" else 'a number, ">= 4.5" or "150..450"'
            yield f"{key}: {json.dumps(condition)} is not allowed; it takes {takes}", (key,)
        elif isinstance(condition, str):
            try:
                parse_condition(condition)
            except InputError as error:
                yield f"{key}: {error}", (key,)


def _metric(key: str, metric: str) -> Iterator[Found]:
    if metric not in METRICS:
        hint = nearest(metric, METRICS) or f"; there are {', '.join(METRICS)}"
        yield f"{key}: unknown metric {metric!r}{hint}", (key,)


def _patterns(reject: Reject) -> Iterator[Found]:
    for side, patterns in (("prompt", reject.prompt), ("response", reject.response)):
        for at, pattern in enumerate(patterns):
            key = f"select.reject.{side}.{at}"
            if problem := pattern_problem(pattern):
                yield (
                    f"{key}: {pattern!r} is no regular expression ({problem}); for example: '\\\\bno ?input\\\\b'",
                    (key,),
                )
            elif not pattern.strip():
                yield f"{key}: {pattern!r} is found in nearly every text: write a word, or take it out", (key,)


def pattern_problem(pattern: str) -> str | None:
    """Return what RE2, which searches the rows, has against a regular expression; None where it takes it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.scalar(""), pattern=pattern, ignore_case=True)
    except pa.ArrowInvalid as error:
        return str(error).removeprefix("Invalid regular expression: ")
    return None
