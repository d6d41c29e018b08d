"""Which keys of a recipe have no effect under which values of other keys: the one table of them.

recipe/lint.py warns of such a key in a recipe, recipe/loader.py refuses such an override, and sweep/search_space.py
refuses such an axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fast_ft.common.folders import is_folder
from fast_ft.hub import gguf_base
from fast_ft.recipe.schema import Recipe, Section

_TWO_STAGES = "curriculum.stages=[{name: easy, upto: 0.5}, {name: all, upto: 1.0}]"
_OPENAI = (
    "judge.model", "judge.protocol", "judge.swap", "judge.concurrency", "judge.max_retries", "judge.timeout_seconds",
    "judge.max_requests", "judge.max_minutes", "judge.max_dollars", "judge.dollars_per_million_tokens",
)  # fmt: skip


class UnusedKey(NamedTuple):
    """A key without effect in one recipe.

    since: why, as in "generate.do_sample is false". instead: the overrides that work; KEY=VALUE among them stands for
    the override that was given, and VALUE for its value.
    """

    key: str
    since: str
    instead: tuple[str, ...]

    def covers(self, key: str) -> bool:
        """Return whether `key` is this key, or a key below it."""
        return key == self.key or key.startswith(f"{self.key}.")


class _Rule(NamedTuple):
    """`keys` have no effect where `holds`; `since` says so in words, and `enable` holds the overrides that end it."""

    keys: tuple[str, ...]
    since: str
    holds: Callable[[Recipe], bool]
    enable: tuple[str, ...]


_RULES = (
    _Rule(
        ("generate.temperature", "generate.top_p", "generate.top_k", "generate.min_p"),
        "generate.do_sample is false",
        lambda recipe: not recipe.generate.do_sample,
        ("generate.do_sample=true",),
    ),
    _Rule(
        ("generate.temperature", "generate.top_p", "generate.min_p"),
        "generate.top_k is 1, which leaves one token to draw from",
        lambda recipe: recipe.generate.top_k == 1,
        ("generate.top_k=30",),
    ),
    _Rule(
        ("select.rank_by",),
        "select.method is random",
        lambda recipe: recipe.select.method == "random",
        ("select.method=top",),
    ),
    _Rule(
        ("select.method", "select.rank_by", "select.strata"),
        "select.take is null and nothing is skipped, which takes all rows",
        lambda recipe: (
            recipe.select.take is None
            and recipe.select.deduplicate == "none"
            and all(getattr(recipe.select.diversify, kind) is None for kind in ("verb", "opening", "topic"))
        ),
        ("select.take=100",),
    ),
    _Rule(
        ("select.strata",),
        "select.method is not stratified",
        lambda recipe: recipe.select.method != "stratified",
        ("select.method=stratified",),
    ),
    _Rule(
        ("select.diversify.topic_similarity",),
        "select.diversify.topic is null",
        lambda recipe: recipe.select.diversify.topic is None,
        ("select.diversify.topic=2",),
    ),
    _Rule(
        ("select.near_duplicate_similarity",),
        "select.deduplicate is not near",
        lambda recipe: recipe.select.deduplicate != "near",
        ("select.deduplicate=near",),
    ),
    _Rule(
        ("curriculum.by",),
        "no stage has upto, or the order ascending",
        lambda recipe: all(stage.upto is None and stage.order == "shuffled" for stage in recipe.curriculum.stages),
        (_TWO_STAGES,),
    ),
    _Rule(
        ("curriculum.cumulative", "curriculum.carry"),
        "there are no two stages",
        lambda recipe: len(recipe.curriculum.stages) < 2,
        (_TWO_STAGES,),
    ),
    _Rule(
        ("curriculum.carry.schedule", "train.warmup_steps", "train.warmup_ratio"),
        "train.lr_scheduler_type is constant",
        lambda recipe: recipe.train.lr_scheduler_type == "constant",
        ("train.lr_scheduler_type=linear",),
    ),
    _Rule(
        ("judge.pattern",),
        "judge.kind is not reference",
        lambda recipe: recipe.judge.kind != "reference",
        ("judge.kind=reference",),
    ),
    _Rule(
        ("train.eval_steps", "train.load_best"),
        "data.validation names no rows",
        lambda recipe: recipe.data.validation is None,
        ("data.validation={take: 50}",),
    ),
    _Rule(
        ("judge.references",),
        "judge.kind is none",
        lambda recipe: recipe.judge.kind == "none",
        ("judge.kind=reference",),
    ),
    _Rule(
        _OPENAI,
        "judge.kind is none",
        lambda recipe: recipe.judge.kind == "none",
        ("judge.kind=openai",),
    ),
    _Rule(
        _OPENAI,
        "judge.kind is reference",
        lambda recipe: recipe.judge.kind == "reference",
        ("judge.kind=openai",),
    ),
    _Rule(
        ("judge.references_from_course",),
        "judge.references names no file",
        lambda recipe: recipe.judge.references is None,
        ("judge.references=FILE",),
    ),
    _Rule(
        ("judge.references_from_course",),
        "the recipe names no rules",
        lambda recipe: recipe.rules is None,
        ("rules=ntu-ml-2025-hw5",),
    ),
    _Rule(
        ("judge.base_prompts",),
        "data.test names no prompts",
        lambda recipe: recipe.data.test is None,
        ("data.test=FILE",),
    ),
    _Rule(
        ("model.revision",),
        "model.name_or_path is a folder or a file here, and revisions are the hub's",
        lambda recipe: all(
            is_folder(name) or gguf_base.is_named(name)
            for name in (recipe.model.name_or_path, recipe.model.tokenizer)
            if name is not None
        ),
        ("model.name_or_path=OWNER/NAME",),
    ),
    _Rule(
        ("search.stage_prompts",),
        "search.pruner is none",
        lambda recipe: recipe.search is not None and recipe.search.pruner == "none",
        ("search.pruner=median",),
    ),
    _Rule(
        ("search.pruner", "search.stage_prompts"),
        "a trial is given up between two stages, and there are no two",
        lambda recipe: (
            recipe.search is not None
            and recipe.search.pruner != "none"
            and len(recipe.curriculum.stages) < 2
            and not any(key.startswith("curriculum") for key in recipe.search.space)
        ),
        (_TWO_STAGES,),
    ),
)


def unused_keys(recipe: Recipe) -> list[UnusedKey]:
    """Return the keys without effect, each once, with every reason."""
    found: dict[str, UnusedKey] = {}
    for rule in _RULES:
        if not rule.holds(recipe):
            continue
        for key in rule.keys:
            before = found.get(key, UnusedKey(key, "", ("KEY=VALUE",)))
            since = " and ".join(filter(None, (before.since, rule.since)))
            found[key] = UnusedKey(key, since, tuple(dict.fromkeys((*rule.enable, *before.instead))))
    for name in ("num_train_epochs", "learning_rate"):
        stages = recipe.curriculum.stages
        if stages and all(getattr(stage, name) is not None for stage in stages):
            instead = tuple(f"curriculum.stages.{i}.{name}=VALUE" for i in range(len(stages)))
            found[f"train.{name}"] = UnusedKey(f"train.{name}", f"each stage has a {name} of its own", instead)
    return list(found.values())


def written_unused_keys(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (since, keys) for the keys without effect that the recipe's author wrote."""
    groups: dict[str, list[str]] = {}
    for each in unused_keys(recipe):
        if _written(recipe, each.key):
            groups.setdefault(each.since, []).append(each.key)
    yield from ((since, tuple(keys)) for since, keys in groups.items())


def unused_everywhere(
    key: str, axes: Mapping[str, Sequence[Any]], recipe_at: Callable[[Mapping[str, Any]], Recipe]
) -> UnusedKey | None:
    """Return why a key has no effect at any point of a space, or None where it has an effect at some point.

    axes: {key: its values}. recipe_at: returns the recipe with some axes' values in it.
    """

    def why(point: Mapping[str, Any]) -> UnusedKey | None:
        """Return why the key has no effect at one point."""
        return next((each for each in unused_keys(recipe_at(point)) if each.covers(key)), None)

    found = why({})
    if found is None:
        return None
    decide = [key, *(word.partition("=")[0] for word in found.instead)]  # axes of other keys change nothing here
    near = [axis for axis in axes if any(one.startswith(axis) or axis.startswith(one) for one in decide)]
    for values in itertools.product(*(axes[axis] for axis in near)):
        if why(dict(zip(near, values, strict=True))) is None:
            return None
    return found


def is_blank(value: object) -> bool:
    """Return whether a value is null, false or empty: nobody expects an effect of such a value."""
    return value is None or value is False or value in ("", (), [], {})


def _written(recipe: Recipe, key: str) -> bool:
    *parents, name = key.split(".")
    section: Any = recipe
    for part in parents:
        if (section := getattr(section, part)) is None:
            return False
    assert isinstance(section, Section)
    field, value = type(section).model_fields[name], getattr(section, name)
    default = field.get_default(call_default_factory=True)
    if name not in section.model_fields_set:
        return False
    # A section with every key in it was written out by `sweep` or `submit`: nobody chose its defaults.
    whole = section.model_fields_set == type(section).model_fields.keys()
    return value != default or not (whole or is_blank(value))
