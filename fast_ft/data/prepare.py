"""Everything before a model is loaded: rows chosen, staged, checked for leakage, turned into tokens, and counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data import (
    contamination,
    curriculum,
    dataset,
    encoding,
    mixing,
    selection,
    sources,
    staging,
    tokenise,
    validation,
)
from fast_ft.data.batches import StageJob
from fast_ft.data.curriculum import Stage
from fast_ft.data.encoding import EncodedRow, Encoder
from fast_ft.data.examples import Example, Prompt
from fast_ft.data.prompt_templates import Llama2Template
from fast_ft.data.staging import Staging
from fast_ft.hub import download
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SelectedData:
    """Rows chosen and staged, and the prompts: all that can be known without a tokenizer.

    digests: sha256 of the "train" and, where there is one, the "test" file. row_notes: what was left out and why, in
    sentences. held_out: the validation rows, on which nothing is trained.
    """

    selection: selection.Selection
    staging: Staging
    prompts: list[Prompt]
    digests: dict[str, str]
    row_notes: list[str]
    held_out: list[Example] = field(default_factory=list, kw_only=True)

    @property
    def stages(self) -> list[Stage]:
        """The stages of the recipe's curriculum."""
        return self.staging.stages

    @property
    def leakage(self) -> dict[str, Any]:
        """The value of contamination.certificate for the staged rows and the prompts."""
        return self.staging.leakage

    @property
    def notes(self) -> list[str]:
        """What there is to say of the rows and of the stages, in sentences."""
        return [*self.row_notes, *self.staging.notes]

    @property
    def examples(self) -> list[Example]:
        """The distinct training rows, in the order in which stages first use them."""
        return staging.distinct(self.stages)

    def staged(self) -> list[dict[str, Any]]:
        """Return what the manifest says of the stages; `epoch_rows` where weights are not 1."""
        staged: list[dict[str, Any]] = []
        seen = staging.weights(self.selection)
        for stage in self.stages:
            weights = [seen[example.id] for example in stage.examples]
            entry = {"name": stage.name, "ids": [example.id for example in stage.examples]}
            staged.append(entry if set(weights) == {1.0} else entry | {"epoch_rows": mixing.epoch_rows(weights)})
        return staged


@dataclass(frozen=True)
class PreparedData(SelectedData):
    """What a run trains on and answers: the selected data and its tokens.

    rows: the selected examples, tokenised, by id; each keeps the contract of prompt and response. prompt_ids: the token
    ids of each prompt, in the prompts' order. jobs: the stages as rows and batches, ready to train. validation: the
    rows of `held_out`, tokenised.
    """

    encoder: Encoder
    rows: dict[str, EncodedRow]
    prompt_ids: list[list[int]]
    jobs: list[StageJob]
    validation: list[EncodedRow] = field(default_factory=list, kw_only=True)

    def restaged(self, recipe: Recipe) -> PreparedData:
        """Return the same rows and prompts as `prepare` returns them for a recipe that selects the same rows.

        Whatever a recipe says of stages, training and answers is taken from it. Raises InputError as `prepare` does.
        """
        tokenise.check_room(recipe, self.prompts, self.prompt_ids)
        found = staging.stage(recipe, self.selection, self.prompts)
        jobs = staging.jobs(recipe, found.stages, self.selection, self.rows, self.encoder)
        return replace(self, staging=found, jobs=jobs)


def prepare(recipe: Recipe) -> PreparedData:
    """Select, stage, check and tokenise. InputError says what is wrong with the data, the tokenizer or the recipe."""
    held_out = recipe.data.held_out
    places = [*(source.path for source in recipe.data.sources), recipe.data.test, held_out.path if held_out else None]
    for where in filter(None, places):
        sources.check_named(where)  # before a tokenizer is fetched
    found = _select(recipe, encoding.load_encoder(recipe.model), [])
    assert isinstance(found, PreparedData)
    return found


def with_prompts(
    prepared: PreparedData, recipe: Recipe, prompts: list[Prompt], digest: str, where: str
) -> PreparedData:
    """Return the same rows with prompts that lie in no file. `where` names them in messages; `digest` tells them apart.

    Raises InputError as `prepare` does.
    """
    named = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": where})})
    notes = list(prepared.row_notes)
    ids = tokenise.prompts(named, prepared.encoder, prompts, notes)
    staged = replace(prepared.staging, leakage=contamination.certificate(prepared.examples, prompts))
    digests = prepared.digests | {"test": digest}
    return replace(prepared, prompts=prompts, prompt_ids=ids, row_notes=notes, staging=staged, digests=digests)


def select_data(recipe: Recipe) -> SelectedData:
    """Select, stage and check; where a tokenizer is at hand, tokenise too and return a PreparedData.

    A note says why tokens were not checked. Raises InputError as `prepare` does, but for a missing tokenizer.
    """
    try:
        encoder = encoding.load_encoder(recipe.model)
    except InputError as error:
        return _select(recipe, None, [f"tokens were not checked: {error}"])
    return _select(recipe, encoder, [])


def _select(recipe: Recipe, encoder: Encoder | None, notes: list[str]) -> SelectedData:
    pool, left_out = contamination.without_excluded(mixing.load_pool(recipe.data), recipe.data.exclude)
    notes += pool.notes
    if left_out:
        notes.append(f"{counted(left_out, 'row')} left out by data.exclude.")
    prompts: list[Prompt] = []
    digests = {"train": pool.digest}
    if recipe.data.test is not None:
        prompts, digests["test"] = dataset.load_prompts(recipe.data.test, recipe.data.columns, notes=notes)
        dataset.refuse_test_as_train(pool, prompts, digests["test"])
    limit = policy_ntu_hw5.max_train_rows(recipe)
    counter = encoder.count_pool if encoder else None
    held_out: selection.Selection | None = None
    if recipe.data.validation is not None:
        pool, held_out, said = validation.hold_out(pool, recipe.data, recipe.select, recipe.seed, counter)
        notes.append(said)
    chosen = selection.select(
        pool,
        recipe.select,
        seed=recipe.seed,
        limit=limit,
        also_measure=[*curriculum.metrics_needed(recipe.curriculum), "score", "response_words"],
        token_counter=counter,
        typed=recipe.typed("select.deduplicate"),
    )
    notes += chosen.notes
    rows: dict[str, EncodedRow] = {}
    prompt_ids: list[list[int]] = []
    if encoder is not None:
        rows, chosen = tokenise.rows(recipe, encoder, chosen, notes)
        prompt_ids = tokenise.prompts(recipe, encoder, prompts, notes)
    measured: list[EncodedRow] = []
    if encoder is not None and held_out is not None:
        found, held_out = tokenise.rows(recipe, encoder, held_out, notes, are_validation=True)
        measured = list(found.values())
    examples_held_out = held_out.examples if held_out is not None else []
    staged = staging.stage(recipe, chosen, prompts)
    if encoder is None:
        return SelectedData(chosen, staged, prompts, digests, notes, held_out=examples_held_out)
    jobs = staging.jobs(recipe, staged.stages, chosen, rows, encoder)
    return PreparedData(
        chosen, staged, prompts, digests, notes, encoder, rows, prompt_ids, jobs,
        held_out=examples_held_out, validation=measured,
    )  # fmt: skip


def compare_tokenizers(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prepared: PreparedData) -> list[str]:
    """Compare our ids with the model's own tokenizer's; return [] or a sentence that names a row that differs.

    Where the recipe names another tokenizer (model.tokenizer), `tokenizer` is that one, and the model's own is read
    here. Raises InputError where every row differs.
    """
    if prepared.encoder.template != "llama-2":
        return []
    special = [token for token in tokenizer.all_special_tokens if token]
    own = _own_encoder(recipe) if recipe.model.tokenizer is not None else None
    plain = [e for e in prepared.examples if not any(token in e.prompt + e.response for token in special)]
    differing = []
    for example in plain:
        first = next(index for index, each in enumerate(example.messages) if each.role == "user")
        asked = example.messages[: first + 1]
        ours = prepared.encoder.prompt_ids([each.turn for each in asked])[1:]
        if own is not None:
            theirs = own.prompt_ids([each.turn for each in asked])[1:]
        else:
            text = Llama2Template.instruction(asked[-1].content, asked[0].content if first else None)
            theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            differing.append(example.id)
    if plain and len(differing) == len(plain):
        raise InputError(
            "the tokenizer that made the training rows gives other ids than the model's own on every row. "
            "Set model.tokenizer to the model's own tokenizer, or leave it out."
        )
    if differing:
        return [
            f"the model's own tokenizer in transformers splits the prompts of {counted(len(differing), 'row')} of "
            f"{len(plain)} differently (first: {differing[0]!r}); training and answers both use ours"
        ]
    return []


def _own_encoder(recipe: Recipe) -> Encoder | None:
    try:
        return Encoder(download.model_folder(recipe.model.name_or_path, recipe.model.revision))
    except InputError:  # a base without a tokenizer of its own is why recipes can name one
        return None
