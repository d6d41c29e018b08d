"""Tokens and labels: the one place where text becomes ids, for training and for generation.

A training row of two exchanges, with Llama 2's template (`.` is masked with -100, `^` is trained on):

    <s> [INST] Name a colour. [/INST] Red is one. </s> <s> [INST] And another? [/INST] Blue. </s>
     .    .      .   .    .       .    ^  ^  ^     ^    .    .     .    .          .     ^     ^

Text is encoded as text: a literal "</s>" in a row never becomes the control token. The forms are in
data/prompt_templates.py and data/chat_template.py, ids come from data/tokenizer.py; torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded, is_folder
from fast_ft.data import special_tokens
from fast_ft.data.chat_template import ChatTemplate
from fast_ft.data.examples import Example, Pool
from fast_ft.data.prompt_templates import Llama2Template, PromptTemplate, TokenisedConversation, as_message
from fast_ft.data.renderers import Llama31, TokenizersOwn
from fast_ft.data.special_tokens import SpecialTokens, TokenizerFiles
from fast_ft.data.tokenizer import Tokenizer, open_tokenizer
from fast_ft.hub import download, families
from fast_ft.recipe import schema

IGNORE_INDEX = -100  #: torch's cross_entropy skips this label


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One tokenised training row. `labels` is as long as `input_ids`: the ids of trained turns, else IGNORE_INDEX."""

    id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """The number of trained tokens, those that end a turn included; never the first, which nothing predicts."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Encoder:
    """Turns conversations into ids by one template, and ids into text.

    `bos_id` and `eos_id` are the tokenizer's own. `end_ids` all end an answer: EOS, the token that the template ends a
    turn with (the first of them, which rows are trained on), and those that the model's files name. `pad_id` is none
    of them.
    """

    def __init__(
        self,
        folder: Path,
        template: Literal["llama-2", "llama-3.1", "tokenizer"] = "llama-2",
        ends: Iterable[int] = (),
    ) -> None:
        files = special_tokens.read(folder)
        self.tokenizer = open_tokenizer(folder, files.added, files.controls)
        tokens = SpecialTokens.of(files, self.tokenizer)
        self.template = template
        self._form = _form(template, files, self.tokenizer, tokens)
        if isinstance(self._form, ChatTemplate) and self._form.end_text not in self.tokenizer.controls.values():
            # A tokenizer's own files may not call it so, but what ends a turn is a control token.
            self.tokenizer = open_tokenizer(folder, files.added, [*files.controls, self._form.end_text])
            self._form = _form(template, files, self.tokenizer, tokens)
        named = [id_ for id_ in (*families.end_token_ids(folder), *ends) if id_ in self.tokenizer.controls]
        self.bos_id, self.eos_id = tokens.bos_id, tokens.eos_id
        self.end_ids = tuple(dict.fromkeys([self._form.end_id, tokens.eos_id, *named]))
        self.pad_id = special_tokens.pad_id(files, self.tokenizer, self.end_ids)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        """Return the ids up to where the answer begins. `messages` are turns of role and content, the last the user's.

        Raises InputError, beginning with the turn, where the template cannot hold them.
        """
        return self._form.prompt_ids([as_message(turn) for turn in messages], tools)

    def conversation(self, example: Example) -> TokenisedConversation:
        """Return the ids of a row, and what the template does with it. Raises InputError as prompt_ids does."""
        return self._form.conversation(example.messages, example.tools)

    def row(self, example: Example) -> EncodedRow:
        """Return the tokenised row of an example. Raises InputError as prompt_ids does."""
        return labelled(example.id, self.conversation(example))

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the tokens of each prompt (template included) and of each response (EOS included)."""
        return self._form.count(prompts, responses)

    def count_pool(self, pool: Pool) -> tuple[list[int], list[int]]:
        """Return the number of masked and of trained tokens of each row of a pool. Raises InputError naming a row."""
        table = pool.table.select(["prompt", "response"]).to_pydict()
        masked, trained = [0] * len(pool), [0] * len(pool)
        exchanges: list[int] = []
        others: list[int] = []
        for index, is_exchange in enumerate(pool.exchanges()):
            (exchanges if is_exchange else others).append(index)
        counts = self.count([table["prompt"][i] for i in exchanges], [table["response"][i] for i in exchanges])
        for index, *lengths in zip(exchanges, *counts, strict=True):
            masked[index], trained[index] = lengths
        for index, example in zip(others, pool.examples(others), strict=True):
            try:
                row = self.row(example)
            except InputError as error:
                raise InputError(f"{pool.source}, row {example.id!r}, {error}") from None
            masked[index], trained[index] = len(row.labels) - row.supervised, row.supervised
        return masked, trained

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        """Return those of the ids that are control tokens."""
        return [id_ for id_ in ids if id_ in self.tokenizer.controls]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens left out, outer spaces stripped."""
        return self.tokenizer.decode(ids).strip()

    def shown(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Return the text that each id adds, for showing tokens apart, and whether it is a control token's name."""
        names = self.tokenizer.controls
        if self.template == "llama-2":
            names = names | {self.eos_id: "<EOS>"} | ({} if self.bos_id is None else {self.bos_id: "<BOS>"})
        return [
            (names[id_], True) if id_ in names else (text, False)
            for id_, text in zip(ids, self.pieces(ids), strict=True)
        ]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each id adds, for showing tokens apart.

        A character of several tokens (bytes) stands at the last of them, the others get "".
        """
        # Decoding ever longer prefixes would be quadratic; a neighbour on the left is enough to keep the space.
        texts, before, now = [], [self.eos_id], []
        for position, token in enumerate(ids, 1):
            now.append(token)
            text = self.tokenizer.decode(before + now)[len(self.tokenizer.decode(before)) :]
            whole = not text.endswith("\ufffd") or len(now) == 4 or position == len(ids)
            texts.append(text if whole else "")
            if whole:
                before, now = now, []
        return texts


def labelled(id_: str, made: TokenisedConversation, *, but_untrained: bool = False) -> EncodedRow:
    """Return a conversation as a training row: trained answers are their own labels.

    but_untrained: all tokens are, prompts too, but for the answers that are not trained.
    """
    labels = [IGNORE_INDEX] * len(made.ids)
    if but_untrained:
        labels = list(made.ids)
        for start, end in made.untrained:
            labels[start:end] = [IGNORE_INDEX] * (end - start)
    for start, end in made.trained:
        labels[start:end] = made.ids[start:end]
    return EncodedRow(id_, made.ids, labels)


def load_encoder(section: schema.Model) -> Encoder:
    """Return the encoder of a recipe's model. InputError where no tokenizer can be reached."""
    folder = download.tokenizer_folder(section.tokenizer or section.name_or_path, section.revision)
    ends: list[int] = []
    if section.tokenizer and is_folder(section.name_or_path):
        ends = families.end_token_ids(expanded(section.name_or_path))
    return Encoder(folder, section.template, ends)


def _form(template: str, files: TokenizerFiles, tokenizer: Tokenizer, tokens: SpecialTokens) -> PromptTemplate:
    if template == "llama-2":
        if tokens.bos_id is None:
            raise InputError(f"{files.folder}: template llama-2 needs a <s> token, and this tokenizer has none.")
        return Llama2Template(tokenizer, tokens)
    own = TokenizersOwn(files) if template == "tokenizer" else Llama31(tokenizer, tokens)
    return ChatTemplate(tokenizer, tokens, own)
