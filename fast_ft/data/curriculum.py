"""Stages of training: which of the selected rows, in what order, how often, at what learning rate."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data.examples import Example
from fast_ft.data.selection import Selection
from fast_ft.recipe.conditions import parse_condition
from fast_ft.recipe.schema import Curriculum, StageSpec, Train

APART = 1.5  #: times that a stage's median should be above the one before it
FEW = 20  #: words or tokens: medians below are so coarse that a ratio of two says nothing


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. Its examples ascend in curriculum.by; without stages in the recipe, the best rank comes first.

    order: "shuffled" is drawn again for each epoch, "ascending" keeps the examples' order.
    """

    name: str
    examples: tuple[Example, ...]
    num_train_epochs: float
    learning_rate: float
    order: Literal["shuffled", "ascending"]


class Spread(NamedTuple):
    """What the rows that a stage adds have in curriculum.by; overlap: the share of them within the range before.

    A cumulative stage holds the rows of the stages before it too. They say nothing of what it adds.
    """

    stage: str
    rows: int
    least: float
    median: float
    most: float
    overlap: float | None  #: None: there is no former stage

    def sentence(self, metric: str) -> str:
        """Return it in words."""
        text = f"{metric}: {self.least:g} to {self.most:g}, median {self.median:g}"
        if self.overlap is None:
            return text
        return (
            f"{counted(self.rows, 'row')} that no stage before has: {text}; {self.overlap:.0%} within the range before"
        )


def stage_spreads(section: Curriculum, selection: Selection, stages: Sequence[Stage]) -> list[Spread]:
    """Return range, median and overlap of the rows that each stage adds; nothing without stages in the recipe."""
    if not section.stages or section.by not in selection.pool.table.column_names:
        return []
    by_id = {row["id"]: row[section.by] for row in selection.rows}
    found: list[Spread] = []
    seen: set[str] = set()
    for stage in stages:
        values = [float(by_id[each.id]) for each in stage.examples if each.id not in seen]  # none is missing
        seen |= {each.id for each in stage.examples}
        if not values:
            continue
        before = found[-1] if found else None
        within = None if before is None else statistics.fmean(before.least <= x <= before.most for x in values)
        found.append(Spread(stage.name, len(values), min(values), statistics.median(values), max(values), within))
    return found


def alike_stages(section: Curriculum, spreads: Sequence[Spread]) -> Iterator[str]:
    """Yield a warning for each stage that is hardly harder than the one before it: medians under APART times."""
    if not section.by.endswith(("_words", "_tokens")):  # only counts have a ratio
        return
    for one, other in itertools.pairwise(spreads):
        if one.median >= FEW and other.median < APART * one.median:
            yield (
                f"warning: curriculum.stages: stages {one.stage} and {other.stage} hardly differ: their medians of "
                f"{section.by} are {one.median:g} and {other.median:g}, less than {APART:g} times apart. Choose rows "
                "that spread further (select.strata), or train in one stage."
            )


def metrics_needed(section: Curriculum) -> list[str]:
    """Return the metrics that build_stages() reads; select() takes them as `also_measure`."""
    if not section.stages:
        return []
    return list(dict.fromkeys([section.by, *(name for stage in section.stages for name in stage.where or {})]))


def build_stages(section: Curriculum, train: Train, selection: Selection, limit: int | None) -> list[Stage]:
    """Return the stages; a recipe without stages has one, "all", over the rows in rank order. Raises InputError.

    `upto` q of n rows takes the round(q n) lowest in curriculum.by (ties keep file order). A cumulative stage holds the
    rows of the stages before it too; another holds only rows that no stage before it has.
    limit: data.max_train_rows, over all stages together.
    """
    if not section.stages:
        examples = tuple(selection.examples)
        stages = [Stage("all", examples, train.num_train_epochs, train.learning_rate, "shuffled")]
    else:
        stages = _build(section, train, selection)
    distinct = len({example.id for stage in stages for example in stage.examples})
    if limit is not None and distinct > limit:
        raise InputError(
            f"curriculum: {counted(distinct, 'row')} over all stages, where data.max_train_rows allows {limit}."
        )
    return stages


def _build(section: Curriculum, train: Train, selection: Selection) -> list[Stage]:
    missing = [name for name in metrics_needed(section) if name not in selection.pool.table.column_names]
    assert not missing, f"select() was not asked to measure {missing}"
    values = {index: selection.metrics(index) for index in selection.indices}
    unmeasured = sum(row[section.by] is None for row in values.values())
    if unmeasured:
        raise InputError(
            f"curriculum.by: {unmeasured} of {len(values)} selected rows have no {section.by}. "
            "Choose another metric, or filter them out in select.where."
        )
    ascending = sorted(sorted(selection.indices), key=lambda index: values[index][section.by])
    examples = dict(zip(selection.indices, selection.examples, strict=True))
    stages: list[Stage] = []
    earlier: set[int] = set()
    highest = 0.0
    for spec in section.stages:
        if spec.name in {stage.name for stage in stages}:
            raise InputError(f"curriculum.stages: two are called {spec.name!r}. Give each its own name.")
        if spec.where is None:
            upto = 1.0 if spec.upto is None else spec.upto
            if upto < highest:
                raise InputError(
                    f"curriculum.stages.{spec.name}.upto: {upto:g} is below an earlier stage's {highest:g}. "
                    "Quantiles grow from stage to stage."
                )
            highest = upto
        own = _own(spec, ascending, values)
        rows = own | earlier if section.cumulative else own - earlier
        if not rows:
            raise InputError(
                f"curriculum.stages.{spec.name}: it holds none of the {len(ascending)} selected rows. "
                "Widen upto or where, or take the stage out."
            )
        earlier |= rows
        stages.append(
            Stage(
                spec.name,
                tuple(examples[index] for index in ascending if index in rows),
                spec.num_train_epochs or train.num_train_epochs,
                spec.learning_rate or train.learning_rate,
                spec.order,
            )
        )
    return stages


def _own(spec: StageSpec, ascending: list[int], values: dict[int, dict[str, float | bool | None]]) -> set[int]:
    """Return the positions of the rows that a stage's own upto or where names."""
    if spec.where is None:
        upto = 1.0 if spec.upto is None else spec.upto
        return set(ascending[: round(upto * len(ascending))])
    if spec.upto is not None:
        raise InputError(f"curriculum.stages.{spec.name}: both upto and where. Keep one of them.")
    conditions = {name: parse_condition(condition, name) for name, condition in spec.where.items()}
    return {index for index in ascending if all(passes(values[index][name]) for name, passes in conditions.items())}
