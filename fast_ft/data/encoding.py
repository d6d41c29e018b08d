"""Tokens and labels: the one place where text becomes ids, for training and for generation.

A training row, with Llama 2's template (`.` is masked with -100, `^` is trained on):

    <s> [INST] Name a colour. [/INST] Red is one. </s>
     .    .      .   .    .       .    ^  ^  ^     ^

Prompt and response are encoded apart, so that the border between them is the same in training, where the response
is known, and in generation, where it is not. Text is encoded as text: a literal "</s>" in a row never becomes the
control token. The forms of prompts are in data/prompt_templates.py, ids come from data/tokenizer.py; torch is not
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.examples import Example
from fast_ft.data.jinja_sandbox import SandboxedTemplate
from fast_ft.data.prompt_templates import ChatTemplate, Llama2Template, Message, PromptTemplate, SpecialTokens
from fast_ft.data.tokenizer import Tokenizer, open_tokenizer
from fast_ft.hub import download
from fast_ft.recipe import schema

IGNORE_INDEX = -100  #: torch's cross_entropy skips this label


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One tokenised training row. `labels` is as long as `input_ids`: IGNORE_INDEX on the prompt, then the ids."""

    id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """The number of trained tokens, EOS included."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class Encoder:
    """Turns prompts and responses into ids by one template, and ids into text.

    `bos_id` and `eos_id` come from tokenizer_config.json. `pad_id` is <unk> where there is one, and never EOS: a
    pad that is EOS gets masked with the padding, and the model does not learn to stop.
    """

    def __init__(self, folder: Path, template: Literal["llama-2", "tokenizer"] = "llama-2") -> None:
        self.tokenizer = open_tokenizer(folder)
        path = folder / "tokenizer_config.json"
        config = untrusted_files.json_object(path, remedy="Fetch the tokenizer again.") if path.is_file() else {}
        tokens = _special_tokens(folder, config, self.tokenizer)
        self.bos_id, self.eos_id, self.pad_id = tokens.bos_id, tokens.eos_id, tokens.pad_id
        self.template = template
        self._form: PromptTemplate
        if template == "tokenizer":
            self._form = ChatTemplate(self.tokenizer, tokens, _chat_template(folder, config))
        elif tokens.bos_id is None:
            raise InputError(f"{folder}: template llama-2 needs a <s> token, and this tokenizer has none.")
        else:
            self._form = Llama2Template(self.tokenizer, tokens)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to where the response begins. `messages` are role and content, the last one the user's."""
        return self._form.prompt_ids(messages)

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids of the response after those messages, the end-of-sequence token included."""
        return self._form.response_ids(messages, response)

    def row(self, example: Example) -> EncodedRow:
        """Return the tokenised row of an example."""
        messages = [{"role": "user", "content": example.prompt}]
        prompt, response = self.prompt_ids(messages), self.response_ids(messages, example.response)
        return EncodedRow(example.id, prompt + response, [IGNORE_INDEX] * len(prompt) + response)

    def count(self, prompts: list[str], responses: list[str]) -> tuple[list[int], list[int]]:
        """Return the tokens of each prompt (template included) and of each response (EOS included)."""
        return self._form.count(prompts, responses)

    def bos_problem(self, ids: Sequence[int]) -> str | None:
        """Return what is wrong with the BOS tokens of a training row by this template, or None."""
        return self._form.bos_problem(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens left out, outer spaces stripped."""
        return self.tokenizer.decode(ids).strip()

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


def load_encoder(section: schema.Model) -> Encoder:
    """Return the encoder of a recipe's model. InputError where no tokenizer can be reached."""
    return Encoder(
        download.tokenizer_folder(section.tokenizer or section.name_or_path, section.revision), section.template
    )


def contract_problems(row: EncodedRow, example: Example, encoder: Encoder, max_length: int) -> list[str]:
    """Say how a row breaks the contract, in plain words; [] when it holds.

    The row is checked against the text it came from, not only against the code that made it: one BOS, at the start;
    the prompt, as generation will give it, masked to its last token; the response trained on from its first token to
    its EOS; nothing cut.
    """
    ids, labels, problems = row.input_ids, row.labels, []
    border = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    if len(ids) != len(labels):
        return [f"{len(ids)} ids but {len(labels)} labels"]
    if labels[border:] != ids[border:]:
        problems.append("a label after the prompt is not the id at its own place")
    if problem := encoder.bos_problem(ids):
        problems.append(problem)
    if ids[:border] != encoder.prompt_ids([{"role": "user", "content": example.prompt}]):
        problems.append("the masked tokens are not the prompt that generation will give")
    if labels[-1:] != [encoder.eos_id]:
        problems.append("the response's EOS is not trained on")
    if encoder.decode(ids[border:]) != example.response:
        problems.append("the trained tokens do not spell the response")
    if example.prompt not in encoder.decode(ids[:border]):
        problems.append("the masked tokens do not spell the prompt")
    if len(ids) > max_length:
        problems.append(f"{len(ids)} tokens, over model.max_length {max_length}")
    return problems


def _special_tokens(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> SpecialTokens:
    bos, eos = (_token_text(config.get(f"{name}_token")) for name in ("bos", "eos"))
    bos, eos = bos or "<s>", eos or "</s>"
    eos_id = tokenizer.token_id(eos)
    if eos_id is None:
        raise InputError(f"{folder}: its end-of-sequence token {eos!r} is not in its vocabulary.")
    pads = ["<unk>", _token_text(config.get("pad_token")), _token_text(config.get("unk_token"))]
    known = [tokenizer.token_id(token) for token in pads if token]
    pad_id = next(i for i in (*known, 0, 1) if i is not None and i != eos_id)
    return SpecialTokens(bos, eos, tokenizer.token_id(bos), eos_id, pad_id)


def _token_text(value: Any) -> str | None:
    """Return a token's text: in tokenizer_config.json it is a string, or an object with the text as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> SandboxedTemplate:
    path = folder / "chat_template.jinja"
    source = untrusted_files.text(path) if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise InputError(f"{folder}: this tokenizer has no chat template. Use model.template: llama-2.")
    return SandboxedTemplate(source, str(folder))
