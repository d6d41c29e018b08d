"""A recipe's sections: every key, its type, its default and its limits.

Keys keep the spelling of TRL, PEFT and transformers. Every default stands here; none is left to a library, since
Unsloth changes TRL's and TRL changes transformers'. `python -m fast_ft schema` prints all of it as JSON Schema.
Reading a file, with overrides and line numbers, is in recipe/loader.py.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Count = Annotated[int, Field(ge=1)]
#: Whole numbers stay whole: a recipe of whole epochs keeps the digest that it has.
Epochs = Count | Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
#: A condition on a metric: ">= 4.5", "150..450" (both ends included), a number or truth value to equal.
Condition = bool | float | str

METRICS = (
    "conversation_words", "prompt_words", "response_words",
    "conversation_tokens", "prompt_tokens", "response_tokens",
    "score", "ends_cleanly", "type_token_ratio", "length_missed",
)  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Model(Section):
    """The base model, and how it is loaded."""

    name_or_path: str = Field(description="A folder, a .gguf file, or a model's id on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="The hub's branch, tag or commit.")
    tokenizer: str | None = Field(default=None, description="A tokenizer's folder or id, in place of the model's own.")
    template: Literal["llama-2", "llama-3.1", "tokenizer"] = Field(
        default="llama-2",
        description="The prompt's form: Llama 2's [INST] ... [/INST], Llama 3.1's headers (as text, where the "
        "tokenizer has no such tokens), or the tokenizer's own chat template.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        default=2048, description="Most tokens in a training row, all turns together."
    )
    load_in_4bit: bool = Field(
        default=True, description="NF4 with double quantisation (bitsandbytes); false: 16 or 32 bits."
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="The type of the arithmetic. auto: bfloat16 from compute capability 8.0, float16 below, float32 on "
        "a CPU.",
    )
    backend: Literal["auto", "fused", "unsloth", "peft"] = Field(
        default="auto",
        description="What trains: fused (our own blocks), unsloth, or peft (transformers + peft). auto: the first of "
        "the ways that plan/cards.json names for the card's compute capability that can; on a CPU peft.",
    )
    adapter: str | None = Field(
        default=None,
        description="A folder with a LoRA adapter in PEFT's form, from which training starts; null: from a new one.",
    )


class Lora(Section):
    """The adapter, in PEFT's terms."""

    r: Annotated[int, Field(ge=0)] = Field(
        default=16, description="Rank: the inner size of the adapter's two matrices."
    )
    lora_alpha: Annotated[float, Field(ge=0)] = Field(
        default=32, description="The adapter's output is scaled by lora_alpha / r; see use_rslora."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="The share of the adapter's inputs that a training pass sets to 0. Own blocks need 0.",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Which layers get an adapter: all-linear, or names such as q_proj."
    )
    use_rslora: bool = Field(
        default=False,
        description="Rank-stabilised LoRA: the scale is lora_alpha / sqrt(r) (arXiv 2312.03732).",
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: the size of each output's weights is trained apart from their direction (arXiv 2402.09353). "
        "Slower: our own blocks and Unsloth's kernels do not know it.",
    )
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = Field(
        default=(),
        description="Parts that are trained and saved whole, beside the LoRA: embed_tokens, lm_head or both. "
        "For a 7B each of them takes some 2 GiB more.",
    )


class Columns(Section):
    """How the rows themselves name what a row has; null: as one of the known layouts names it."""

    messages: str | None = Field(default=None, description="A list of turns, each with a role and a content.")
    prompt: str | None = Field(default=None, description="The user's text.")
    response: str | None = Field(default=None, description="The answer to learn.")
    system: str | None = Field(default=None, description="The system turn's text.")
    context: str | None = Field(default=None, description="A text that the prompt is about.")
    id: str | None = Field(default=None, description="A name that no other row has.")
    score: str | None = Field(default=None, description="A number that says how good the row is.")

    @property
    def given(self) -> dict[str, str]:
        """{our name: the rows' own name} of what is set."""
        return {key: own for key, own in self if own is not None}


class SourceFile(Section):
    """One of several sources of training rows."""

    path: str = Field(description="A file, a folder or a hub id.")
    take: Count | None = Field(
        default=None, description="Most rows of this source that are selected; null: no limit of its own."
    )
    weight: Positive = Field(
        default=1.0,
        description="How often an epoch sees each of its rows. 2: twice; 0.5: half of them, others in each epoch.",
    )
    columns: Columns | None = Field(default=None, description="The columns of this source; null: data.columns.")
    split: str | None = Field(default=None, description="The split of this source; null: data.split.")


class Validation(Section):
    """Rows whose loss is measured, and on which nothing is trained: drawn from the training rows, or of a file."""

    take: Count | None = Field(default=None, description="How many rows are drawn; of a file, null: all.")
    path: str | None = Field(default=None, description="A file, a folder or a hub id; null: drawn from data.train.")
    split: str | None = Field(default=None, description="The file's split, where it holds several.")


class Data(Section):
    """Where rows come from. The layout is found by looking at the content."""

    train: str | Annotated[tuple[str | SourceFile, ...], Field(min_length=1)] = Field(
        description="Training rows: a file, a folder or a hub id, or a list of several of them."
    )
    test: str | None = Field(default=None, description="Prompts to answer; without it a run ends with the adapter.")
    split: str | None = Field(
        default=None, description="The split of data.train, where it holds several; null: train, where there is one."
    )
    columns: Columns = Columns()
    validation: str | Validation | None = Field(
        default=None,
        description="Rows kept out of training, whose loss is measured: a file, or {take: 50} of data.train.",
    )
    max_train_rows: Count | None = Field(
        default=None, description="Most distinct training rows over all stages; null: no limit."
    )
    train_on: Literal["all", "last"] = Field(
        default="all", description="Which answers of a row of several turns have a loss: all of them, or the last."
    )
    overlong: Literal["error", "drop"] = Field(
        default="error", description="A selected row over model.max_length tokens: refuse, or drop it and say so."
    )
    unencodable: Literal["error", "drop"] = Field(
        default="error",
        description="A selected row with a character that the tokenizer cannot give back: refuse, or drop and say so.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Rows with these prompts are left out before selection, by 16 hex digits of the prompt's text "
        "(data/contamination.py, text_digest). A sweep writes its validation set here.",
    )

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """The sources of training rows, each with its own columns and split."""
        listed = (self.train,) if isinstance(self.train, str) else self.train
        entries = [SourceFile(path=each) if isinstance(each, str) else each for each in listed]
        return tuple(
            each.model_copy(update={"columns": each.columns or self.columns, "split": each.split or self.split})
            for each in entries
        )

    @property
    def held_out(self) -> Validation | None:
        """`validation` as a section."""
        return Validation(path=self.validation) if isinstance(self.validation, str) else self.validation

    @property
    def train_name(self) -> str:
        """The sources' paths as one text."""
        return " + ".join(each.path for each in self.sources)

    @property
    def short_name(self) -> str:
        """The names of the sources' files, without their folders, as one text."""
        return " + ".join(PurePath(each.path).name for each in self.sources)


class Reject(Section):
    """Texts that no row taken holds: regular expressions (RE2's), found anywhere in a text, case ignored."""

    prompt: tuple[str, ...] = Field(default=(), description="Patterns of prompts whose rows are left out.")
    response: tuple[str, ...] = Field(default=(), description="Patterns of responses whose rows are left out.")


class Diversify(Section):
    """How many rows of one kind are taken at most. The kinds come from the rows' own texts; null: no limit."""

    verb: Count | None = Field(
        default=None,
        description="Most rows whose prompts begin with the same word, which in most instructions is the verb.",
    )
    opening: Count | None = Field(
        default=None, description="Most rows whose responses begin with the same three words."
    )
    topic: Count | None = Field(
        default=None, description="Most rows of one topic: rows that have many of their rare words in common."
    )
    topic_similarity: Share = Field(
        default=0.2,
        description="Cosine similarity of tf-idf weighted words from which a row is of the topic of a row before it.",
    )


class Select(Section):
    """Which rows are taken: `where` filters, `rank_by` orders, `method` and `take` pick, duplicates go."""

    where: dict[str, Condition] = Field(
        default_factory=dict, description='Conditions on metrics, for example {score: ">= 4.5"}.'
    )
    rank_by: dict[str, float] = Field(
        default_factory=dict,
        description="One metric, or a weighted sum of z-scores over the rows that `where` "
        "left. The highest come first; a negative weight turns a metric round. Ties keep file order.",
    )
    reject: Reject = Reject()
    method: Literal["top", "middle", "stratified", "random"] = Field(
        default="top",
        description="top: the first ranks; middle: the central ones; stratified: evenly over all ranks, or over "
        "`strata`; random: drawn with the recipe's seed.",
    )
    strata: dict[str, Count | tuple[float, ...]] = Field(
        default_factory=dict,
        description="stratified: {metric: borders}, or a number of parts with equally many rows. Several metrics make "
        "cells. Each cell gives as many rows as the others while it has some, its best ranks first.",
    )
    take: Count | None = Field(default=None, description="How many rows; null: all that are left.")
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="exact",
        description="exact: same prompt and response but for case, spaces and the punctuation of sentences; near: also "
        "rows whose response, and prompt and response together, are as alike as near_duplicate_similarity.",
    )
    near_duplicate_similarity: Share = Field(
        default=0.6, description="Jaccard similarity of word 5-gram sets; a gram that many rows hold does not count."
    )
    diversify: Diversify = Diversify()


class StageSpec(Section):
    """One curriculum stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] = Field(
        description="The stage's name in logs and in the report: 1 to 40 letters, digits, _ or -."
    )
    upto: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="The stage trains on the selected rows up to this quantile of curriculum.by."
    )
    where: dict[str, Condition] | None = Field(default=None, description="In place of upto: conditions on metrics.")
    num_train_epochs: Epochs | None = Field(
        default=None, description="How often the stage sees each of its rows; null: train.num_train_epochs."
    )
    learning_rate: Positive | None = Field(
        default=None, description="The stage's highest learning rate; null: train.learning_rate."
    )
    order: Literal["shuffled", "ascending"] = Field(
        default="shuffled",
        description="Order of rows: another random one in each epoch, or ascending in curriculum.by.",
    )


class Carry(Section):
    """What goes from one stage to the next. false: it starts again."""

    optimizer: bool = Field(default=True, description="The optimizer's state, and the fp16 loss scale with it.")
    schedule: bool = Field(default=True, description="One warm-up and decay over all stages, or one for each.")


class Curriculum(Section):
    """Stages of training. No stages given means one, over all selected rows."""

    by: str = Field(default="response_words", description="The metric whose quantiles make stages; low is easy.")
    cumulative: bool = Field(
        default=True, description="A stage holds the rows of the stages before it too; false: only its own."
    )
    carry: Carry = Carry()
    stages: tuple[StageSpec, ...] = Field(default=(), description="The stages, in the order of training.")


class Train(Section):
    """Training arguments, in TRL's and transformers' terms."""

    effective_batch_size: Count = Field(default=8, description="Rows in one optimizer step.")
    per_device_train_batch_size: Count | Literal["auto"] = Field(
        default="auto", description="Rows in one forward pass; auto: as many as the memory budget holds."
    )
    num_train_epochs: Epochs = Field(
        default=1, description="How often each row is seen. 1.5: once, and the first half of a second pass's steps."
    )
    max_steps: Count | None = Field(
        default=None,
        description="Stop after this number of optimizer steps over all stages; null: when the epochs are done.",
    )
    learning_rate: Positive = Field(default=2e-4, description="The optimizer's step size after warm-up, its highest.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear",
        description="The learning rate after warm-up: linear and cosine fall to 0; constant_with_warmup stays; "
        "constant has no warm-up.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=10, description="Steps in which the learning rate rises from 0; null: by warmup_ratio."
    )
    warmup_ratio: Share | None = Field(
        default=None, description="The same as a share of all steps, rounded up; give it or warmup_steps, not both."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="AdamW's decay of the adapter's weights; 0: none."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Gradients with a larger norm are scaled down to it; 0: never."
    )
    optim: Literal["adamw_torch", "adamw_8bit"] = Field(
        default="adamw_8bit", description="The optimizer: PyTorch's AdamW, or bitsandbytes' with 8-bit states."
    )
    neftune_noise_alpha: Positive | None = Field(
        default=None,
        description="NEFTune: noise of alpha / sqrt(L d) on the embeddings, L being each row's own length.",
    )
    completion_only_loss: bool = Field(
        default=True, description="Train on the response alone; false: on the prompt too, for comparison."
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Compute activations again in the backward pass, for less memory; auto: where they do not fit.",
    )
    capture: bool = Field(
        default=True, description="Replay passes from CUDA graphs on a card that would wait for Python's launches."
    )
    max_bad_steps: Count = Field(
        default=8,
        description="After this number of steps in a row without a finite loss and finite gradients, training goes "
        "back to the last good state, with half the learning rate; the second time it ends.",
    )
    deterministic: bool = Field(
        default=False, description="Only operations that give the same bits each time on one card; slower."
    )
    save_steps: Count | None = Field(
        default=None, description="Number of steps between two checkpoints; null: checkpoints at stage ends only."
    )
    eval_steps: Count | None = Field(
        default=None,
        description="Number of steps between two measurements of the validation loss; null: at stage ends only.",
    )
    load_best: bool = Field(
        default=False, description="End with the weights of the least validation loss, in place of the last ones."
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none",
        description="A tracker for the curves, through transformers; its package is yours to install. Refused under "
        "the homework's rules. log.jsonl and report.html need none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ratio_in_place_of_steps(cls, values: Any) -> Any:
        """Let a share of steps that is given alone take the place of the default number of steps."""
        if isinstance(values, dict) and values.get("warmup_ratio") is not None and "warmup_steps" not in values:
            return values | {"warmup_steps": None}
        return values


KvCache = Literal["16bit", "8bit"]


class Generate(Section):
    """Decoding, in transformers' terms."""

    do_sample: bool = Field(default=True, description="Draw each token at random; false: take the likeliest one.")
    temperature: Positive = Field(
        default=0.7, description="The logits are divided by it before a token is drawn: under 1, likely tokens gain."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.9, description="Draw from the fewest likeliest tokens that have this probability together; 1: all."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=30, description="Draw from this number of likeliest tokens; 0: all."
    )
    min_p: Share = Field(default=0.0, description="Leave out tokens less likely than this share of the likeliest.")
    repetition_penalty: Positive = Field(
        default=1.0, description="Makes tokens that the prompt or the answer has already less likely; 1: no penalty."
    )
    max_new_tokens: Count = Field(default=1024, description="An answer is cut off after this number of tokens.")
    num_return_sequences: Count = Field(default=1, description="Answers to each prompt; they share its first pass.")
    batch_size: Count | Literal["auto"] = Field(
        default="auto", description="Answers decoded side by side; auto: as many as the memory budget holds."
    )
    kv_cache: KvCache = Field(
        default="16bit",
        description="Keys and values of earlier tokens, as the model computes them or in 8 bits with a scale for each "
        "token and head: then twice as many answers are decoded side by side in the same memory.",
    )


JudgeKindName = Literal["reference", "openai"]


class Judge(Section):
    """How answers are scored."""

    kind: Literal["none", JudgeKindName] = Field(
        default="none",
        description="reference: exact match, ROUGE-L and chrF against `references`, no network; openai: a model behind "
        "OPENAI_BASE_URL with OPENAI_API_KEY, both from the environment.",
    )
    base_prompts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="How many of the first prompts the base model answers too, for before and after."
    )
    references: str | None = Field(
        default=None,
        description="Reference answers: a file in any layout that data.train may have. A prompt's reference is the row "
        "with its id or with its text. openai without it: each answer alone.",
    )
    references_from_course: bool = Field(
        default=False,
        description="Under `rules`: the course gave out these reference answers. Without it, references may only be "
        "rows of data.train with their own answers.",
    )
    protocol: Literal["reasons", "ntu-ml-2025-hw5"] = Field(
        default="reasons",
        description="openai: reasons asks for scores and reasons, in at most 400 tokens; ntu-ml-2025-hw5 asks as the "
        "homework's script: temperature 0, five tokens, the reference first as assistant 1. The words are our own.",
    )
    pattern: str | None = Field(
        default=None,
        description="reference: a regular expression of the manner that answers should have. An answer scores 1 where "
        "all of it matches, in place of an exact match.",
    )
    model: str = Field(default="gpt-4o-mini", description="openai: the judge; gpt-4o-mini is the homework's.")
    swap: bool = Field(
        default=False, description="openai: ask a second time with the two answers swapped; the mean of both counts."
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(default=8, description="openai: requests at a time.")
    max_retries: Annotated[int, Field(ge=0, le=20)] = Field(
        default=6, description="openai: how often one request is tried again, with growing pauses."
    )
    timeout_seconds: Positive = Field(default=60.0, description="openai: the longest that one reply may take.")
    max_requests: Count = Field(
        default=2000, description="openai: the most requests that one command may send, retries included."
    )
    max_minutes: Positive = Field(
        default=120.0, description="openai: the longest that one command may ask, pauses included."
    )
    max_dollars: Positive = Field(
        default=1.0, description="openai: the most that one command may cost, where the model's price is known."
    )
    dollars_per_million_tokens: tuple[NotNegative, NotNegative] | None = Field(
        default=None,
        description="openai: the model's price, read and written; null: from a small table, if it is there.",
    )


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
