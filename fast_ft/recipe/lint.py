"""What a recipe would lead to, found before anything is loaded: values that cannot work together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fast_ft.common.errors import nearest
from fast_ft.common.folders import expanded
from fast_ft.common.wording import counted
from fast_ft.hub.families import context_length
from fast_ft.recipe import effects, lint_adapter, lint_selection, lora_kinds
from fast_ft.recipe.schema import Data, Recipe
from fast_ft.recipe.steps import epoch_steps, stage_steps, warmup_steps

PLACEHOLDERS = ("recipe", "digest8")  #: what output_dir may hold in braces


class Problem(NamedTuple):
    """A sentence that begins with a key's dotted path, and the keys whose values it depends on, that key first."""

    text: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


def lint(recipe: Recipe) -> tuple[list[Problem], list[Problem]]:
    """Return (errors, warnings): an error is a run that fails or does not do what the recipe says."""
    errors = [
        *(Problem(*each) for each in lint_selection.problems(recipe)), *_stages(recipe),
        *_warmup(recipe), *_steps(recipe), *_context(recipe), *_batch(recipe),
        *(Problem(*each) for each in lint_adapter.problems(recipe)), *_paths(recipe),
    ]  # fmt: skip
    return errors, list(_warnings(recipe))


def _stages(recipe: Recipe) -> Iterator[Problem]:
    names: dict[str, str] = {}
    before = 0.0
    for i, stage in enumerate(recipe.curriculum.stages):
        path = f"curriculum.stages.{i}"
        if (stage.upto is None) == (stage.where is None):
            said = "neither upto nor where" if stage.upto is None else "both upto and where"
            text = f"{path}: stage {stage.name!r} has {said}; a stage takes one of them, upto: 1.0 being all rows"
            yield Problem(text, (path,))
        if stage.name in names:
            text = f"{path}.name: {stage.name!r} is the name of {names[stage.name]} too; stages need names of their own"
            yield Problem(text, (f"{path}.name",))
        names.setdefault(stage.name, path)
        yield from (Problem(*each) for each in lint_selection.conditions(f"{path}.where", stage.where or {}))
        if stage.upto is not None:
            if stage.upto < before or (stage.upto == before and not recipe.curriculum.cumulative):
                text = f"{path}.upto: {stage.upto:g} comes after {before:g}; stages go from easy to all: let upto rise"
                yield Problem(text, (f"{path}.upto", "curriculum.stages", "curriculum.cumulative"))
            before = stage.upto


def _warmup(recipe: Recipe) -> Iterator[Problem]:
    steps, ratio = recipe.train.warmup_steps, recipe.train.warmup_ratio
    keys = ("train.warmup_ratio", "train.warmup_steps")
    if steps is not None and ratio is not None:
        text = f"train.warmup_ratio: {ratio:g} of all steps, but train.warmup_steps says {steps}: keep one of them, and"
        yield Problem(f"{text} write null for the other", keys)
    if steps is None and ratio is None:
        yield Problem("train.warmup_steps: null, and no train.warmup_ratio; write 0 for no warm-up", keys[::-1])


def _steps(recipe: Recipe) -> Iterator[Problem]:
    steps = stage_steps(recipe)
    train = recipe.train
    if steps is None:
        return
    if (train.warmup_steps is None) == (train.warmup_ratio is None):
        return
    depends_on = ("select.take", "data.max_train_rows", "train.num_train_epochs", "train.max_steps",
                "train.effective_batch_size", "curriculum.stages", "curriculum.cumulative",
                "curriculum.carry.schedule")  # fmt: skip
    if train.lr_scheduler_type != "constant":
        one = recipe.curriculum.carry.schedule
        length = sum(steps) if one else min(steps)
        key = "train.warmup_steps" if train.warmup_ratio is None else "train.warmup_ratio"
        if (rising := warmup_steps(train, length)) >= length:
            text = (
                f"{key}: {counted(rising, 'step')} of warm-up, but "
                f"{'the run' if one else 'a stage'} has at most {length}: the learning rate would not reach "
                f"{train.learning_rate:g}; lower it or train longer"
            )
            yield Problem(text, (key, "train.lr_scheduler_type", *depends_on))


def _context(recipe: Recipe) -> Iterator[Problem]:
    context = context_length(recipe.model.name_or_path)
    if context is None:
        return
    if recipe.model.max_length > context:
        text = f"model.max_length: {recipe.model.max_length} tokens, but the model's context has {context}: lower it"
        yield Problem(text, ("model.max_length", "model.name_or_path"))
    if recipe.data.test and recipe.generate.max_new_tokens >= context:
        text = (
            f"generate.max_new_tokens: {recipe.generate.max_new_tokens} new tokens leave no room for a prompt in the "
            f"model's context of {context} tokens: write {context // 2} or less"
        )
        yield Problem(text, ("generate.max_new_tokens", "model.name_or_path", "data.test"))


def _batch(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    one, all_ = train.per_device_train_batch_size, train.effective_batch_size
    if isinstance(one, int) and all_ % one:
        text = f"train.per_device_train_batch_size: {one} does not divide effective_batch_size {all_}: one step is"
        keys = ("train.per_device_train_batch_size", "train.effective_batch_size")
        yield Problem(f"{text} a whole number of forward passes; write a divisor, or auto", keys)


def _paths(recipe: Recipe) -> Iterator[Problem]:
    data, judge = recipe.data, recipe.judge
    empty = {"model.name_or_path": recipe.model.name_or_path, "data.test": data.test, "output_dir": recipe.output_dir,
             "judge.references": judge.references, "judge.model": judge.model}  # fmt: skip
    for key, value in empty.items():
        if value is not None and not value.strip():
            yield Problem(f"{key}: the text is empty", (key,))
    yield from _sources(data)
    if problem := unknown_placeholder(recipe.output_dir):
        yield Problem(f"output_dir: {problem}", ("output_dir",))
    if ".." in Path(recipe.output_dir).parts:
        text = f"output_dir: {recipe.output_dir!r} steps out of its folder by ..: write where it leads, without .."
        yield Problem(text, ("output_dir",))
    if judge.kind == "reference" and not judge.references:
        text = "judge.references: missing; judge.kind: reference compares answers with a file of reference answers"
        yield Problem(text, ("judge.references", "judge.kind"))
    if judge.pattern is not None:
        try:
            re.compile(judge.pattern)
        except re.error as error:
            text = f"judge.pattern: {judge.pattern!r} is no regular expression ({error}); for example: 'Yes, .+'"
            yield Problem(text, ("judge.pattern",))
    if judge.kind != "none" and not data.test:
        text = f"judge.kind: {judge.kind} has nothing to judge, since data.test names no prompts: give some, or kind:"
        yield Problem(f"{text} none", ("judge.kind", "data.test"))
    if judge.kind == "openai" and judge.protocol == "ntu-ml-2025-hw5":
        text = f"judge.protocol: {judge.protocol} compares each answer with a reference answer"
        if not judge.references:
            yield Problem(
                f"{text}: give judge.references=FILE, or write reasons", ("judge.protocol", "judge.references")
            )
        if judge.swap:
            text = f"judge.swap: under judge.protocol {judge.protocol} the reference stands first, always"
            yield Problem(f"{text}: write swap: false, or protocol: reasons", ("judge.swap", "judge.protocol"))
    elif judge.kind == "openai" and judge.swap and not judge.references:
        text = "judge.swap: without judge.references each answer is judged alone: there is nothing to swap"
        yield Problem(text, ("judge.swap", "judge.references", "judge.kind"))


def _sources(data: Data) -> Iterator[Problem]:
    """Find sources of training rows that are empty, that stand twice, or that are the prompts to answer."""
    held_out = data.held_out
    if held_out is not None and held_out.path is None and held_out.take is None:
        yield Problem("data.validation: neither take nor path; write {take: 50}, or a file", ("data.validation",))
    if held_out is not None and held_out.path is not None and held_out.path == data.test:
        text = f"data.validation: {held_out.path} is the test set, which may shape nothing: give other rows"
        yield Problem(text, ("data.validation", "data.test"))
    seen: set[tuple[Path, str | None]] = set()
    for index, source in enumerate(data.sources):
        key = "data.train" if isinstance(data.train, str) else f"data.train.{index}"
        place = expanded(source.path).resolve()
        if not source.path.strip():
            yield Problem(f"{key}: the text is empty", (key,))
        elif data.test and expanded(data.test).resolve() == place and source.split in (None, "test"):
            text = f"data.test: {data.test} is the training data too; a model answers what it has seen: give other rows"
            yield Problem(text, ("data.test", "data.train"))
        elif (place, source.split) in seen:
            text = f"{key}: {source.path} stands twice; to see its rows more often, write it once and set weight: 2"
            yield Problem(text, (key, "data.train"))
        seen.add((place, source.split))


def _warnings(recipe: Recipe) -> Iterator[Problem]:
    select, stages, train = recipe.select, recipe.curriculum.stages, recipe.train
    if recipe.model.backend == "auto" and (kind := lora_kinds.unknown("fused", recipe.lora)):
        text = f"{kind.key}: our own blocks do not know {kind.name}; Unsloth or PEFT trains it, more slowly"
        yield Problem(text, (kind.key, "model.backend"))
    if not select.rank_by and (select.method == "middle" or (select.method == "stratified" and not select.strata)):
        text = f"select.method: {select.method} of the file's order, since select.rank_by names no metric"
        yield Problem(text, ("select.method", "select.rank_by"))
    for metric, weight in select.rank_by.items():
        if weight == 0:
            yield Problem(f"select.rank_by.{metric}: weight 0 has no effect", (f"select.rank_by.{metric}",))
    if stages and all(stage.upto is not None for stage in stages) and (last := stages[-1].upto or 0) < 1:
        text = f"curriculum.stages: the last stage ends at {last:g}; the selected rows beyond it are never trained on"
        yield Problem(text, ("curriculum.stages",))
    if train.learning_rate > 1e-2:
        text = f"train.learning_rate: {train.learning_rate:g} is far above what LoRA takes, 1e-5 to 1e-3"
        yield Problem(text, ("train.learning_rate",))
    if recipe.generate.num_return_sequences > 1 and not recipe.generate.do_sample:
        text = f"generate.num_return_sequences: {recipe.generate.num_return_sequences} equal answers to each prompt"
        keys = ("generate.num_return_sequences", "generate.do_sample")
        yield Problem(f"{text}, since generate.do_sample is false", keys)
    yield from _never(recipe)
    for since, names in effects.written_unused_keys(recipe):
        yield Problem(f"{', '.join(names)}: not used, since {since}", names)


def _never(recipe: Recipe) -> Iterator[Problem]:
    """Find steps that the run does not reach."""
    steps, train = epoch_steps(recipe), recipe.train
    if steps is None:
        return
    if train.max_steps and train.max_steps > sum(steps):
        text = f"train.max_steps: step {train.max_steps} never comes, since the epochs end after at most "
        yield Problem(text + counted(sum(steps), "step"), ("train.max_steps",))
    longest = max(stage_steps(recipe) or steps)
    if train.save_steps and train.save_steps > longest:
        where = "the run" if len(steps) == 1 else "the longest stage"
        text = f"train.save_steps: step {train.save_steps} never comes, since {where} has at most "
        text += counted(longest, "step")
        yield Problem(f"{text}; there will be checkpoints at stage ends only", ("train.save_steps",))


def unknown_placeholder(output_dir: str) -> str | None:
    """Return what is wrong with the {names} in output_dir, or None."""
    for name in re.findall(r"\{([^}]*)\}?", output_dir):
        if name not in PLACEHOLDERS:
            known = " and ".join(f"{{{word}}}" for word in PLACEHOLDERS)
            return f"{{{name}}} is unknown{nearest(name, PLACEHOLDERS)}; {known} are filled in"
    return None
