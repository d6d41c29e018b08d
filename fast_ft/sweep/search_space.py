"""The space of a sweep: which keys take which values, the recipe as a point in it, and a trial's recipe."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fast_ft.common.errors import InputError, nearest
from fast_ft.recipe import effects
from fast_ft.recipe.loader import resolved, validated
from fast_ft.recipe.schema import Range, Recipe, Section
from fast_ft.sweep.axis import Axis, check_range, on_step, text

Point = dict[str, Any]  #: {axis: number or JSON text}, as Optuna keeps it
#: What a sweep compares by, or what its trials share; another value would be another sweep. Of deterministic operations
#: a process decides before its first one, and a worker does many trials.
FIXED = (
    "search",
    "rules",
    "run_name",
    "output_dir",
    "judge",
    "budget",
    "backup_dir",
    "data.train",
    "data.test",
    "data.exclude",
    "train.deterministic",
)
MOST_POINTS = 10_000  #: of a grid
_MAPPINGS = ("select.where.", "select.rank_by.", "select.strata.")  #: mappings that are values: any metric may be a key


@dataclass(frozen=True)
class SearchSpace:
    """The axes, and the recipe's own point. notes: what was done to hold that point."""

    axes: tuple[Axis, ...]
    own: Point
    notes: tuple[str, ...]

    def check_grid(self) -> None:
        """Raise InputError for a grid with more points than anybody waits for."""
        if (count := math.prod(axis.count for axis in self.axes)) > MOST_POINTS:
            raise InputError(
                f"search.space: a grid of {count:,} points, where {MOST_POINTS:,} are the most. Give fewer values or "
                "longer steps, or draw some of these points with search.sampler: random"
            )

    def grid(self) -> Iterator[Point]:
        """Yield every point, the recipe's own first."""
        yield self.own
        for values in itertools.product(*(axis.grid() for axis in self.axes)):
            point = dict(zip((axis.key for axis in self.axes), values, strict=True))
            if point != self.own:
                yield point


def read(recipe: Recipe) -> SearchSpace:
    """Return the recipe's search space. Raises InputError for keys and values that no recipe could have."""
    search = recipe.search
    assert search is not None
    if search.sampler == "grid" and search.pruner == "hyperband":
        raise InputError("search.pruner: hyperband chooses among trials at random; with a grid use median or none")
    axes, own, notes = [], {}, []
    sets: dict[str, str] = {}  # each key that an axis sets, and the axis
    for key, values in search.space.items():
        _check_key(recipe, key)
        for each in _sets(recipe, key, values):
            if other := next((axis for there, axis in sets.items() if _overlap(each, there)), None):
                raise InputError(f"search.space.{key}: {other} sets {each} too. Give each key in one of them only")
            sets[each] = key
        here = _own(recipe, key, values)
        if isinstance(values, Range):
            axis = Axis(key, range=values)
            check_range(key, values)
            if here is None or isinstance(here, bool | str):
                raise InputError(f"search.space.{key}: the recipe has {here!r} there, no number: give a list of values")
            if not values.low <= here <= values.high:
                notes.append(f"{key}: the recipe's own {here:g} is outside of {values.low:g} to {values.high:g}")
            own[key] = here
        else:
            if not values:
                raise InputError(f"search.space.{key}: the list is empty")
            texts = list(dict.fromkeys(text(value) for value in values))
            own[key] = text(here)
            if own[key] not in texts:
                texts.insert(0, own[key])
                shown = own[key] if len(own[key]) <= 80 else own[key][:77] + "..."
                notes.append(f"{key}: the recipe's own {shown} is one more value")
            axis = Axis(key, tuple(texts))
        for probe in axis.values():
            validated(_put(resolved(recipe), key, probe), {}, f"search.space.{key}", consequences=False)
        axes.append(axis)
    _check_effects(recipe, axes)
    return SearchSpace(tuple(axes), own, tuple(notes))


def at(recipe: Recipe, point: Point, fixed: Mapping[str, Any]) -> Recipe:
    """Return the recipe with a point's values and `fixed` ones ({key: value}) in it; InputError where that is none."""
    tree = resolved(recipe)
    assert recipe.search is not None
    for key, value in point.items():
        values = recipe.search.space[key]
        _put(tree, key, on_step(values, value) if isinstance(values, Range) else json.loads(value))
    for key, value in fixed.items():
        _put(tree, key, value)
    return validated(tree, {}, "the trial")


def _sets(recipe: Recipe, key: str, values: Any) -> list[str]:
    """Return the keys that an axis sets, of a section those that its mappings name; InputError for a fixed one."""
    mappings = [] if isinstance(values, Range) else [value for value in values if isinstance(value, dict)]
    names = dict.fromkeys(name for value in mappings for name in value) if _is_section(recipe, key) else {}
    keys = [f"{key}.{name}" for name in names] or [key]
    for each in (key, *keys):
        if any(f"{each}.".startswith(f"{fixed}.") for fixed in FIXED):
            named = "" if each == key else f"{each} is "
            raise InputError(f"search.space.{key}: {named}the same in all trials, since they are compared: take it out")
    return keys


def _overlap(one: str, other: str) -> bool:
    """Return whether two dotted keys are the same, or one is a section that holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_key(recipe: Recipe, key: str) -> None:
    parent: Any = resolved(recipe)
    for part in key.split("."):
        if isinstance(parent, list) and part.isdigit() and int(part) < len(parent):
            parent = parent[int(part)]
        elif isinstance(parent, dict) and (part in parent or key.startswith(_MAPPINGS)):
            parent = parent.get(part)
        else:
            known = parent if isinstance(parent, dict) else []
            raise InputError(f"search.space.{key}: no such key in a recipe{nearest(part, known)}")


def _check_effects(recipe: Recipe, axes: list[Axis]) -> None:
    """Raise InputError for an axis whose key has no effect at any point of the space."""

    def at_point(point: Mapping[str, Any]) -> Recipe:
        """Return the recipe with a point's values."""
        tree = resolved(recipe)
        for key, value in point.items():
            _put(tree, key, value)
        return validated(tree, {}, "search.space", consequences=False)

    values = {axis.key: axis.values() for axis in axes}
    for axis in axes:
        # A mapping over a section, such as lora: [{r: 8}], gives the keys that it names.
        named = [value for value in values[axis.key] if isinstance(value, dict) and _is_section(recipe, axis.key)]
        for key in dict.fromkeys(f"{axis.key}.{name}" for value in named for name in value) or [axis.key]:
            if each := effects.unused_everywhere(key, values, at_point):
                words = " ".join(word for word in each.instead if word != "KEY=VALUE").replace("=VALUE", "=...")
                raise InputError(
                    f"search.space.{axis.key}: all values come to the same, since {key} is not used: {each.since}. "
                    f"Take the axis out, or give the recipe {words}"
                )


def _own(recipe: Recipe, key: str, values: Any) -> Any:
    """Return the recipe's own value at `key`; of a section, the keys that the values name."""
    here: Any = resolved(recipe)
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, list) else (here or {}).get(part)
    if _is_section(recipe, key) and not isinstance(values, Range):
        if not all(isinstance(value, dict) for value in values):
            raise InputError(f"search.space.{key}: a section; give it mappings such as {{r: 8, lora_alpha: 16}}")
        return {name: here[name] for value in values for name in value if name in here}
    return here


def _is_section(recipe: Recipe, key: str) -> bool:
    here: Any = recipe
    for part in key.split("."):
        here = getattr(here, part, None) if isinstance(here, Section) else None
    return isinstance(here, Section)


def _put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Put a value at a dotted key, in place; a mapping for one of the recipe's sections goes over what is there."""
    *parents, last = key.split(".")
    at: Any = tree
    for part in parents:
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        at = at[int(part)] if isinstance(at, list) else at[part]
    name: Any = int(last) if isinstance(at, list) else last
    free = f"{key}." in _MAPPINGS
    if isinstance(value, dict) and not free and not isinstance(at, list) and isinstance(at.get(name), dict):
        at[name] = at[name] | copy.deepcopy(value)
    else:
        at[name] = copy.deepcopy(value)
    return tree
