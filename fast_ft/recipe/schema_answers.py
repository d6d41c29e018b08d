"""The keys of `generate` and `judge`: how prompts are answered, and how answers are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fast_ft.recipe.schema_values import Count, NotNegative, Positive, Section, Share

KvCache = Literal["16bit", "8bit"]
JudgeKindName = Literal["reference", "openai"]


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
