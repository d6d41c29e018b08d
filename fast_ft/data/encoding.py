"""Prompt template, tokens and labels: the one place where text becomes ids, for training and for generation.

A training row, with Llama 2's template (`.` is masked with -100, `^` is trained on):

    <s> [INST] Name a colour. [/INST] Red is one. </s>
     .    .      .   .    .       .    ^  ^  ^     ^

Prompt and response are encoded apart, so that the border between them is the same in training, where the response
is known, and in generation, where it is not. Text is encoded as text: a literal "</s>" in a row never becomes the
control token. Ids come from data/tokenizer.py; torch is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.dataset import Example
from fast_ft.data.jinja_sandbox import ChatTemplate
from fast_ft.data.tokenizer import open_codec
from fast_ft.hub import download
from fast_ft.recipe import schema

IGNORE_INDEX = -100  #: torch's cross_entropy skips this label
Message = dict[str, str]


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
    """Turns prompts and responses into ids by one template.

    `bos_id` and `eos_id` come from tokenizer_config.json. `pad_id` is <unk> where there is one, and never EOS: a
    pad that is EOS gets masked with the padding, and the model does not learn to stop.
    """

    def __init__(self, folder: Path, template: str = "llama-2") -> None:
        self._codec = open_codec(folder)
        path = folder / "tokenizer_config.json"
        config = untrusted_files.json_object(path, remedy="Fetch the tokenizer again.") if path.is_file() else {}
        self._bos = _token_text(config.get("bos_token")) or "<s>"
        self._eos = _token_text(config.get("eos_token")) or "</s>"
        self.bos_id = self._codec.token_id(self._bos)
        eos_id = self._codec.token_id(self._eos)
        if eos_id is None:
            raise InputError(f"{folder}: its end-of-sequence token {self._eos!r} is not in its vocabulary.")
        self.eos_id: int = eos_id
        pads = ["<unk>", _token_text(config.get("pad_token")), _token_text(config.get("unk_token"))]
        known = [self._codec.token_id(token) for token in pads if token]
        self.pad_id: int = next(i for i in (*known, 0, 1) if i is not None and i != eos_id)
        self.template = template
        self._chat = _chat_template(folder, config) if template == "tokenizer" else None
        if template == "llama-2" and self.bos_id is None:
            raise InputError(f"{folder}: template llama-2 needs a <s> token, and this tokenizer has none.")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the response begins. `messages` are role and content, the last one the user's.

        Llama 2's template begins each exchange with BOS and ends each earlier one with EOS.
        """
        if self._chat is not None:
            return self._rendered(messages, add_generation_prompt=True, apart=self._looks_special(messages))
        ids: list[int] = []
        for text, answer in _llama_2(messages):
            ids += [_known(self.bos_id), *self._codec.encode([text])[0]]
            if answer is not None:
                ids += [*self._codec.encode([answer])[0], self.eos_id]
        return ids

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Ids of the response after those messages, the end-of-sequence token included."""
        if self._chat is None:
            return [*self._codec.encode([response])[0], self.eos_id]
        whole = [*messages, {"role": "assistant", "content": response}]
        # Encoded in one go, as everybody else will; apart where that would read text as control tokens, or where a
        # token would reach over the border of prompt and response.
        for apart in (False, True):
            if not apart and self._looks_special(whole):
                continue
            prompt = self._rendered(messages, add_generation_prompt=True, apart=apart)
            full = self._rendered(whole, add_generation_prompt=False, apart=apart)
            if full[: len(prompt)] == prompt and self.eos_id in full[len(prompt) :]:
                break
        else:
            raise InputError(
                "The tokenizer's chat template does not give the prompt, then the response, then the end of "
                "sequence. Use model.template: llama-2, or another tokenizer."
            )
        rest = full[len(prompt) :]
        return rest[: len(rest) - rest[::-1].index(self.eos_id)]  # what follows EOS is never generated

    def row(self, example: Example) -> EncodedRow:
        """Return the tokenised row of an example."""
        messages = [{"role": "user", "content": example.prompt}]
        prompt, response = self.prompt_ids(messages), self.response_ids(messages, example.response)
        return EncodedRow(example.id, prompt + response, [IGNORE_INDEX] * len(prompt) + response)

    def count(self, prompts: list[str], responses: list[str]) -> tuple[list[int], list[int]]:
        """Return the tokens of each prompt (template included) and of each response (EOS included)."""
        if self._chat is None:
            texts = [_inst(prompt) for prompt in prompts]
            return (
                [1 + len(ids) for ids in self._codec.encode(texts)],
                [1 + len(ids) for ids in self._codec.encode(responses)],
            )
        rows = [self.row(Example("", p, r, None)) for p, r in zip(prompts, responses, strict=True)]
        return [len(r.labels) - r.supervised for r in rows], [r.supervised for r in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens left out, outer spaces stripped."""
        return self._codec.decode(ids).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each id adds, for showing tokens apart.

        A character of several tokens (bytes) stands at the last of them, the others get "".
        """
        # decoding ever longer prefixes would be quadratic; a neighbour on the left is enough to keep the space
        texts, before, now = [], [self.eos_id], []
        for position, token in enumerate(ids, 1):
            now.append(token)
            text = self._codec.decode(before + now)[len(self._codec.decode(before)) :]
            whole = not text.endswith("\ufffd") or len(now) == 4 or position == len(ids)
            texts.append(text if whole else "")
            if whole:
                before, now = now, []
        return texts

    def _looks_special(self, messages: Sequence[Message]) -> bool:
        return any(token in message["content"] for token in self._codec.special_tokens() for message in messages)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool, apart: bool) -> list[int]:
        """Ids of the tokenizer's own template; `apart`: contents are encoded each by itself, as text."""
        chat = self._chat
        assert chat is not None

        def render(contents: Sequence[str]) -> str:
            filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
            return chat.render(
                filled, add_generation_prompt=add_generation_prompt, bos_token=self._bos, eos_token=self._eos
            )

        contents = [m["content"] for m in messages]
        if not apart:
            return self._codec.encode([render(contents)], specials=True)[0]
        # Private-use characters stand for the contents, so that the template's own text is told from theirs.
        marks = [chr(0xE000 + i) for i in range(len(contents))]
        ids: list[int] = []
        rest = render(marks)
        for mark, content in zip(marks, contents, strict=True):
            before, _, rest = rest.partition(mark)
            ids += self._codec.encode([before], specials=True)[0] + self._codec.encode([content])[0]
        return ids + self._codec.encode([rest], specials=True)[0]


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
    begins = ids.count(encoder.bos_id) if encoder.bos_id is not None else 0
    if encoder.template == "llama-2" and (ids[:1] != [encoder.bos_id] or begins != 1):
        problems.append(f"{begins} BOS tokens, where one is due, at the start")
    elif begins > 1 and encoder.bos_id != encoder.eos_id:  # a chat template may do without
        problems.append(f"{begins} BOS tokens, where one is due at most")
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


def _llama_2(messages: Sequence[Message]) -> list[tuple[str, str | None]]:
    """(prompt, answer) of each exchange in Llama 2's chat form (Meta's llama repository, generation.py).

    The last answer is None. BOS and EOS are left to the caller.
    """
    lead = "".join(f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n" for m in messages if m["role"] == "system")
    turns = [m["content"] for m in messages if m["role"] != "system"]
    answers = [*turns[1::2], None]
    users = turns[::2]
    return [(_inst(lead * (i == 0) + user), answers[i]) for i, user in enumerate(users)]


def _inst(text: str) -> str:
    return f"[INST] {text} [/INST]"


def _known(token_id: int | None) -> int:
    assert token_id is not None, "the constructor refuses a tokenizer without BOS"
    return token_id


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its text as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate:
    path = folder / "chat_template.jinja"
    source = untrusted_files.text(path) if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise InputError(f"{folder}: this tokenizer has no chat template. Use model.template: llama-2.")
    return ChatTemplate(source, str(folder))
