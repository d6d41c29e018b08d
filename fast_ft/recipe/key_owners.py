"""The owner of each key of a recipe: the run, or the machine. A recipe from elsewhere decides only what a run is.

run      the key is a part of the run: it shapes the adapter or the answers, and keeps its value wherever it is rerun
machine  the key is a place, a server, a tracker, a limit or a price: whoever makes the run sets it
hub      a model's id on the hub is a part of the run, but a folder of that name is a place of the machine

A key that is not listed here fails a test, so that nobody can add one without deciding this.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic.fields import FieldInfo

from fast_ft.hub import gguf_base
from fast_ft.recipe.schema import Recipe, Section

Owner = Literal["run", "machine", "hub"]

_HUB = "model.name_or_path model.tokenizer model.adapter"
_MACHINE = """
run_name output_dir backup_dir
data.train data.test
train.report_to
judge.kind judge.base_prompts judge.references judge.references_from_course judge.pattern judge.model judge.protocol
judge.swap judge.concurrency judge.max_retries judge.timeout_seconds judge.max_requests judge.max_minutes
judge.max_dollars judge.dollars_per_million_tokens
budget.gpu budget.memory_gib budget.train_minutes budget.generate_minutes
"""
_RUN = """
rules seed
model.revision model.template model.max_length model.load_in_4bit model.dtype model.backend
lora.r lora.lora_alpha lora.lora_dropout lora.target_modules lora.use_rslora lora.use_dora lora.modules_to_save
data.max_train_rows data.train_on data.overlong data.unencodable data.exclude
data.split data.validation data.columns.messages data.columns.prompt data.columns.response data.columns.system
data.columns.context data.columns.id data.columns.score train.eval_steps train.load_best
select.where select.rank_by select.reject.prompt select.reject.response select.method select.strata select.take
select.deduplicate select.near_duplicate_similarity
select.diversify.verb select.diversify.opening select.diversify.topic select.diversify.topic_similarity
curriculum.by curriculum.cumulative curriculum.carry.optimizer curriculum.carry.schedule
curriculum.stages.name curriculum.stages.upto curriculum.stages.where curriculum.stages.num_train_epochs
curriculum.stages.learning_rate curriculum.stages.order
train.effective_batch_size train.per_device_train_batch_size train.num_train_epochs train.max_steps
train.learning_rate train.lr_scheduler_type train.warmup_steps train.warmup_ratio
train.weight_decay train.max_grad_norm train.optim
train.neftune_noise_alpha train.completion_only_loss train.gradient_checkpointing train.capture train.max_bad_steps
train.deterministic train.save_steps
generate.do_sample generate.temperature generate.top_p generate.top_k generate.min_p generate.repetition_penalty
generate.max_new_tokens generate.num_return_sequences generate.batch_size generate.kv_cache
"""
_LISTS: dict[Owner, str] = {"run": _RUN, "machine": _MACHINE, "hub": _HUB}
OWNERS: dict[str, Owner] = {key: owner for owner, keys in _LISTS.items() for key in keys.split()}


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) for every key of a run's recipe, which has no `search`."""
    yield from ((key, field) for key, field in _below(Recipe) if not key.startswith("search."))


def brought_here(tree: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe from elsewhere with the machine's keys set again.

    own: {dotted key: value} of the machine's keys. A key of the machine's without a value there gets its default.
    """
    brought = copy.deepcopy(tree)
    for key, field in fields():
        if OWNERS[key] == "machine":
            *sections, last = key.split(".")
            section = brought
            for name in sections:
                section = section[name]
            section[last] = own[key] if key in own or field.is_required() else field.get_default()
    return brought


def is_hub_id(name: str) -> bool:
    """Return whether a model's name can be an id on the hub; any other name is a folder's or a file's."""
    return (
        not gguf_base.is_named(name)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None
    )


def _below(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        # A place may be a plain text, too (data.train): then it is one key.
        inner = [] if str in get_args(field.annotation) else list(_sections(field.annotation))
        for each in inner:
            yield from _below(each, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", field


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a type holds, however deep: in `Search | None`, in `tuple[StageSpec, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
