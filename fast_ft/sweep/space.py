"""The space of a sweep: which keys take which values, the recipe as a point in it, and a trial's recipe.

A value is kept in Optuna as a number where the key has a range, and as its JSON text where it has a list of values:
Optuna's categories know no lists or mappings, and hold 1, 1.0 and true for the same.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fast_ft import effects
from fast_ft.errors import InputError, nearest
from fast_ft.load import resolved, validated
from fast_ft.recipe import Range, Recipe, Search

Point = dict[str, Any]  #: {axis: number or JSON text}, as Optuna keeps it
#: What a sweep compares by, or what its trials share; another value would be another sweep.
FIXED = ("search", "rules", "output_dir", "judge", "budget", "data.train", "data.test", "data.exclude")


@dataclass(frozen=True)
class Axis:
    """A key with its values: `choices` as JSON texts, or a range of numbers."""

    key: str
    choices: tuple[str, ...] = ()
    range: Range | None = None

    def distribution(self) -> Any:
        """Return the axis as Optuna's distribution."""
        from optuna import distributions as optuna

        if self.range is None:
            return optuna.CategoricalDistribution(self.choices)
        low, high, log, step = self.range.low, self.range.high, self.range.log, self.range.step
        if self.whole:
            return optuna.IntDistribution(int(low), int(high), log=log, step=int(step or 1))
        return optuna.FloatDistribution(low, high, log=log, step=step)

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return self.range is not None and isinstance(self.range.low, int) and isinstance(self.range.high, int)

    def values(self) -> list[Any]:
        """Return the values of a list, or the ends of a range."""
        if self.range is None:
            return [json.loads(each) for each in self.choices]
        return [self.range.low, self.range.high]

    def grid(self) -> list[Any]:
        """Return every value of the axis; InputError for a range without a step."""
        if self.range is None:
            return list(self.choices)
        if self.range.step is None and not self.whole:
            raise InputError(
                f"search.space.{self.key}: a grid needs values, and this range has no step: give it one, or a list"
            )
        step = self.range.step or 1
        count = int((self.range.high - self.range.low) / step + 1e-9) + 1
        return [self.range.low + n * step for n in range(count)]


@dataclass(frozen=True)
class Space:
    """The axes, and the recipe's own point. notes: what was done to hold that point."""

    axes: tuple[Axis, ...]
    own: Point
    notes: tuple[str, ...]

    def grid(self) -> Iterator[Point]:
        """Yield every point, the recipe's own first."""
        yield self.own
        for values in itertools.product(*(axis.grid() for axis in self.axes)):
            point = dict(zip((axis.key for axis in self.axes), values, strict=True))
            if point != self.own:
                yield point


def read(recipe: Recipe) -> Space:
    """Return the recipe's search space; InputError lists keys and values that no recipe could have."""
    search = recipe.search
    assert search is not None
    if search.sampler == "grid" and search.pruner == "hyperband":
        raise InputError("search.pruner: hyperband chooses among trials at random; with a grid use median or none")
    axes, own, notes = [], {}, []
    for key, values in search.space.items():
        _check_key(recipe, key)
        here = _own(recipe, key, values)
        if isinstance(values, Range):
            axis = Axis(key, range=values)
            _check_range(key, values)
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
    return Space(tuple(axes), own, tuple(notes))


def at(recipe: Recipe, point: Point, fixed: Mapping[str, Any]) -> Recipe:
    """Return the recipe with a point's values and `fixed` ones ({key: value}) in it; InputError where that is none."""
    tree = resolved(recipe)
    assert recipe.search is not None
    for key, value in point.items():
        _put(tree, key, value if isinstance(recipe.search.space[key], Range) else json.loads(value))
    for key, value in fixed.items():
        _put(tree, key, value)
    return validated(tree, {}, "the trial")


def text(value: Any) -> str:
    """Return a value as JSON text, equal for equal values: 32 and 32.0 are."""
    return json.dumps(_whole(value), ensure_ascii=False, sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def sampler(search: Search, seed: int) -> Any:
    """Return Optuna's sampler. Grid points are listed by Space.grid: Optuna's own hands some out twice in parallel."""
    import optuna

    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(search: Search) -> Any:
    """Return Optuna's pruner; its steps are stages, counted from 1."""
    import optuna

    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.NopPruner()


def _check_key(recipe: Recipe, key: str) -> None:
    if key.split(".")[0] in FIXED or any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED):
        raise InputError(f"search.space.{key}: the same in all trials, since they are compared: take it out")
    parent: Any = resolved(recipe)
    for part in key.split("."):
        if isinstance(parent, list) and part.isdigit() and int(part) < len(parent):
            parent = parent[int(part)]
        elif isinstance(parent, dict) and (part in parent or key.startswith(("select.where.", "select.rank_by."))):
            parent = parent.get(part)
        else:
            known = parent if isinstance(parent, dict) else []
            raise InputError(f"search.space.{key}: no such key in a recipe{nearest(part, known)}")


def _check_range(key: str, values: Range) -> None:
    if not values.low < values.high:
        raise InputError(f"search.space.{key}: low {values.low:g} is not below high {values.high:g}")
    if values.log and (values.low <= 0 or values.step is not None):
        raise InputError(f"search.space.{key}: log needs a low above 0 and no step")


def _check_effects(recipe: Recipe, axes: list[Axis]) -> None:
    """Raise InputError for an axis whose key has no effect at any point of the space."""

    def at_point(point: Mapping[str, Any]) -> Recipe:
        tree = resolved(recipe)
        for key, value in point.items():
            _put(tree, key, value)
        return validated(tree, {}, "search.space", consequences=False)

    values = {axis.key: axis.values() for axis in axes}
    for axis in axes:
        # A mapping over a section, such as lora: [{r: 8}], gives the keys that it names.
        named = [value for value in values[axis.key] if isinstance(value, dict) and _is_section(recipe, axis.key)]
        for key in dict.fromkeys(f"{axis.key}.{name}" for value in named for name in value) or [axis.key]:
            if each := effects.always_idle(key, values, at_point):
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
    from fast_ft.recipe import Section

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
    free = key in ("select.where", "select.rank_by")  # mappings that are values
    if isinstance(value, dict) and not free and not isinstance(at, list) and isinstance(at.get(name), dict):
        at[name] = at[name] | copy.deepcopy(value)
    else:
        at[name] = copy.deepcopy(value)
    return tree
