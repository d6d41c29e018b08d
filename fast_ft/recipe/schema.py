"""A recipe: its sections, and every key's type, default and limits.

Keys keep the spelling of TRL, PEFT and transformers. Every default stands here or in one of the modules beside this one
that hold the sections (schema_rows.py, schema_training.py, schema_answers.py). None is left to a library, since Unsloth
changes TRL's and TRL changes transformers'. `python -m fast_ft schema` prints all of it as JSON Schema. Reading a file,
with overrides and line numbers, is in recipe/loader.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from fast_ft.recipe.schema_answers import Generate, Judge, JudgeKindName, KvCache
from fast_ft.recipe.schema_rows import Columns, Data, Diversify, Reject, Select, SourceFile, Validation
from fast_ft.recipe.schema_training import Carry, Curriculum, Lora, Model, StageSpec, Train
from fast_ft.recipe.schema_values import METRICS, Condition, Count, Positive, Section

__all__ = [
    "METRICS", "Budget", "Carry", "Columns", "Condition", "Curriculum", "Data", "Diversify", "Generate", "Judge",
    "JudgeKindName", "KvCache", "Lora", "Model", "Range", "Recipe", "Reject", "Search", "Section", "Select",
    "SourceFile", "StageSpec", "Train", "Validation",
]  # fmt: skip


class Budget(Section):
    """What a run may use."""

    gpu: str | None = Field(default=None, description="The card to plan for when there is none here, for example t4.")
    memory_gib: Positive | Literal["auto"] = Field(
        default="auto", description="The most GPU memory that a run takes, in GiB; auto: what is free on the card."
    )
    train_minutes: Positive | None = Field(
        default=None, description="Training ends in time for this number of minutes; null: no limit."
    )
    generate_minutes: Positive | None = Field(
        default=None,
        description="The same for answering: answers that are not complete are cut off; null: no limit.",
    )


class Range(Section):
    """Numbers to search in, both ends included. Two whole ends: whole numbers."""

    low: int | float = Field(description="The lowest value.")
    high: int | float = Field(description="The highest value.")
    log: bool = Field(default=False, description="Draw on a logarithmic scale.")
    step: Annotated[int | float, Field(gt=0)] | None = Field(
        default=None, description="The distance between two values; null: any value. The grid sampler needs one."
    )


class Search(Section):
    """What `python -m fast_ft sweep` tries. It is no part of a run: a run of this recipe leaves it out."""

    space: dict[str, Range | tuple[Any, ...]] = Field(
        min_length=1,
        description="{key: values, or a Range}, such as {lora.r: [8, 16], train.learning_rate: {low: 1e-4, high: 1e-3, "
        "log: true}}. Values of a whole section, such as lora: [{r: 8, lora_alpha: 16}], change the keys they name.",
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe", description="How values are chosen: Optuna's TPE, at random, or every combination once."
    )
    trials: Count | None = Field(default=None, description="Most trials, the recipe itself included; null: no limit.")
    objective: Literal["judge", "exact_match", "rouge_l", "chrf"] = Field(
        default="judge",
        description="What is maximised: the mean of the recipe's judge, or a measure of the reference judge.",
    )
    prompts: Annotated[int, Field(ge=10)] = Field(
        default=100, description="Rows drawn for validation before any selection; no trial trains on them."
    )
    where: dict[str, Condition] = Field(
        default_factory=dict, description="Conditions on validation rows, besides those of select.where."
    )
    pruner: Literal["median", "hyperband", "none"] = Field(
        default="median", description="What stops a hopeless trial at a stage's end."
    )
    stage_prompts: Annotated[int, Field(ge=10)] = Field(
        default=30, description="How many of the validation prompts are answered at a stage's end, for the pruner."
    )


class Recipe(Section):
    """A complete run: rows, model, adapter, training, decoding, and their limits."""

    rules: Literal["ntu-ml-2025-hw5"] | None = Field(
        default=None, description="A homework's rules, kept by code: at most 100 rows, LLaMA2-7B in 4 bits, seed 3407."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=3407, description="All random numbers of a run are drawn from it."
    )
    run_name: Annotated[str, Field(min_length=1, max_length=60)] | None = Field(
        default=None,
        description="A name of your own for the run, in `runs` and in the report. It changes nothing else.",
    )
    output_dir: str = Field(default="runs/{recipe}-{digest8}", description="The run folder.")
    backup_dir: str | None = Field(
        default=None,
        description="Another folder, such as a mounted Drive's: each checkpoint and each finished phase is copied "
        "there, and a fresh machine goes on from it.",
    )
    model: Model
    lora: Lora = Lora()
    data: Data
    select: Select = Select()
    curriculum: Curriculum = Curriculum()
    train: Train = Train()
    generate: Generate = Generate()
    judge: Judge = Judge()
    budget: Budget = Budget()
    search: Search | None = None
    _typed: frozenset[str] = PrivateAttr(default=frozenset())

    def typed(self, key: str) -> bool:
        """Return whether `key` was given on the command line, or the recipe was written out by this program."""
        section = getattr(self, key.split(".")[0])
        written_out = isinstance(section, Section) and section.model_fields_set == type(section).model_fields.keys()
        return written_out or any(key == given or key.startswith(f"{given}.") for given in self._typed)
