"""The keys of `data` and `select`: where rows come from, and which of them are taken."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from fast_ft.recipe.schema_values import Condition, Count, Positive, Section, Share


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
    exclude: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...] = Field(
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
