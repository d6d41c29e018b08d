"""The forms that a conversation takes as token ids. This module has Llama 2's; data/chat_template.py has the others.

Another form is another class with PromptTemplate's methods, chosen in data/encoding.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fast_ft.common.errors import InputError
from fast_ft.data.examples import Message
from fast_ft.data.special_tokens import SpecialTokens
from fast_ft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenisedConversation:
    """The ids of a conversation.

    trained: (start, end) of each trained answer's tokens, its end token included. texts: what each of these parts
    spells. untrained: (start, end) of the other answers. controls: the ids of the control tokens, all of them the
    form's own. context_differs: for each trained answer, whether a later turn changes what stands before it, so that no
    prompt has these ids. remarks: what a user should know.
    """

    ids: list[int]
    trained: list[tuple[int, int]]
    texts: list[str]
    untrained: list[tuple[int, int]]
    controls: list[int]
    context_differs: list[bool]
    remarks: list[str]


class PromptTemplate(Protocol):
    """One form of a conversation."""

    #: The id of the token that ends an answer in this form.
    end_id: int

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any]) -> TokenisedConversation:
        """Return the ids of a row. Raises InputError, beginning with the turn, where the form cannot hold it."""

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """Return the ids up to where the answer to the last turn begins. Raises InputError likewise."""

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the number of tokens of each single-turn prompt, and of each response to it (its end included)."""


def turn_name(messages: Sequence[Message], index: int) -> str:
    """Return how a message names a turn: "turn 3 (system)", counted from 1."""
    return f"turn {index + 1} ({messages[index].role})"


def as_message(turn: Mapping[str, Any]) -> Message:
    """Return the Message of a turn that is to be read, as a prompt has them."""
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return Message(turn["role"], turn["content"], more=more)


class Llama2Template:
    """Llama 2's chat form (Meta's llama repository, generation.py): <s>[INST] user [/INST] answer </s>.

    Each exchange begins with BOS, and each answer ends with EOS. A system turn stands in the first user turn, between
    <<SYS>> and <</SYS>>. An answer is encoded apart from its prompt, so that the border between them is the same in
    generation, where the answer is not known. Meta's prompts have a space before an earlier answer's EOS, which its
    models never write themselves: it is left out.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
        assert tokens.bos_id is not None, "data/encoding.py refuses a tokenizer without BOS"
        self._tokenizer, self._bos_id, self.end_id = tokenizer, tokens.bos_id, tokens.eos_id

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any]) -> TokenisedConversation:
        """Return the ids of a row. Raises InputError, beginning with the turn, where the form cannot hold it."""
        ids: list[int] = []
        trained, texts, untrained, controls = [], [], [], []
        for message, part in zip(self._turns(messages, tools), self._parts(messages, tools), strict=True):
            if message.trained:
                trained.append((len(ids), len(ids) + len(part)))
                texts.append(message.content)
            elif message.role == "assistant":
                untrained.append((len(ids), len(ids) + len(part)))
            ids += part
            controls.append(self.end_id if message.role == "assistant" else self._bos_id)
        return TokenisedConversation(ids, trained, texts, untrained, controls, [False] * len(trained), [])

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """Return the ids up to where the answer to the last turn begins. Raises InputError likewise."""
        return [id_ for part in self._parts(messages, tools) for id_ in part]

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the number of tokens of each single-turn prompt (BOS included) and of each response (EOS included)."""
        encoded_prompts = self._tokenizer.encode([self.instruction(prompt) for prompt in prompts])
        encoded_responses = self._tokenizer.encode(responses)
        return [1 + len(ids) for ids in encoded_prompts], [1 + len(ids) for ids in encoded_responses]

    @staticmethod
    def instruction(text: str, system: str | None = None) -> str:
        """Return the text of a user turn."""
        return f"[INST] {text} [/INST]" if system is None else f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]"

    def _parts(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[list[int]]:
        """Return the ids of each user and assistant turn."""
        system = messages[0].content if messages[0].role == "system" else None
        turns = self._turns(messages, tools)
        texts = [each.content if each.role == "assistant" else self.instruction(each.content) for each in turns]
        texts[0] = self.instruction(turns[0].content, system)
        encoded = self._tokenizer.encode(texts)
        return [
            [*ids, self.end_id] if each.role == "assistant" else [self._bos_id, *ids]
            for each, ids in zip(turns, encoded, strict=True)
        ]

    @staticmethod
    def _turns(messages: Sequence[Message], tools: Sequence[Any]) -> Sequence[Message]:
        """Return the user and assistant turns. Raises InputError for what Llama 2's form has no place for."""
        remedy = "Llama 2's form has no place for it: take it out, or use model.template: tokenizer."
        if tools:
            raise InputError(f"tools: {remedy}")
        for index, message in enumerate(messages):
            if message.role == "tool" or (message.role == "system" and index):
                raise InputError(f"{turn_name(messages, index)}: {remedy}")
            if message.more:
                raise InputError(f"{turn_name(messages, index)}, {', '.join(message.more)}: {remedy}")
        return messages[1:] if messages[0].role == "system" else messages
