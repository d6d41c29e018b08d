"""The forms that messages take as token ids: Llama 2's, and the one that a tokenizer brings itself.

Another form is another class with PromptTemplate's methods, chosen in data/encoding.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fast_ft.common.errors import InputError
from fast_ft.data.jinja_sandbox import SandboxedTemplate
from fast_ft.data.tokenizer import Tokenizer

Message = dict[str, str]  #: role ("system", "user" or "assistant") and content


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that begin and end a sequence, and the one that fills it up. bos_id is None where there is no BOS."""

    bos: str
    eos: str
    bos_id: int | None
    eos_id: int
    pad_id: int


class PromptTemplate(Protocol):
    """One form of a conversation. `messages` end with the user's turn."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to where the response begins."""

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids of the response after those messages, the end-of-sequence token included."""

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the number of tokens of each single-turn prompt, and of each response to it (EOS included)."""

    def bos_problem(self, ids: Sequence[int]) -> str | None:
        """Return what is wrong with the BOS tokens of a training row, or None."""


class Llama2Template:
    """Llama 2's chat form (Meta's llama repository, generation.py): <s> [INST] user [/INST] answer </s>.

    Each exchange begins with BOS, and each earlier one ends with EOS. A system turn stands in the first user turn.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
        assert tokens.bos_id is not None, "Encoder refuses a tokenizer without BOS"
        self._tokenizer, self._bos_id, self._eos_id = tokenizer, tokens.bos_id, tokens.eos_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to where the response begins."""
        ids: list[int] = []
        for prompt, answer in self._exchanges(messages):
            ids += [self._bos_id, *self._tokenizer.encode([prompt])[0]]
            if answer is not None:
                ids += [*self._tokenizer.encode([answer])[0], self._eos_id]
        return ids

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids of the response and EOS; the messages before it change nothing."""
        return [*self._tokenizer.encode([response])[0], self._eos_id]

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the number of tokens of each single-turn prompt (BOS included) and of each response (EOS included)."""
        encoded_prompts = self._tokenizer.encode([self._instruction(prompt) for prompt in prompts])
        encoded_responses = self._tokenizer.encode(responses)
        return [1 + len(ids) for ids in encoded_prompts], [1 + len(ids) for ids in encoded_responses]

    def bos_problem(self, ids: Sequence[int]) -> str | None:
        """Return a sentence unless the row has one BOS, at its start."""
        begins = list(ids).count(self._bos_id)
        if begins == 1 and ids[0] == self._bos_id:
            return None
        return f"{begins} BOS tokens, where one is due, at the start"

    def _exchanges(self, messages: Sequence[Message]) -> Iterator[tuple[str, str | None]]:
        """Yield the text of each prompt with the answer to it; the last prompt's answer is None."""
        system = "".join(f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n" for m in messages if m["role"] == "system")
        turns = [m["content"] for m in messages if m["role"] != "system"]
        for index, (user, answer) in enumerate(zip(turns[::2], [*turns[1::2], None], strict=False)):
            yield self._instruction(system * (index == 0) + user), answer

    @staticmethod
    def _instruction(text: str) -> str:
        return f"[INST] {text} [/INST]"


class ChatTemplate:
    """The form that a tokenizer's own chat template gives, rendered in a process of its own."""

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens, template: SandboxedTemplate) -> None:
        self._tokenizer, self._tokens, self._template = tokenizer, tokens, template

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to where the response begins. Raises InputError where the template fails."""
        return self._rendered(messages, add_generation_prompt=True, apart=self._looks_special(messages))

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Return the ids of the response up to EOS. Raises InputError where the template does not end with one."""
        whole = [*messages, {"role": "assistant", "content": response}]
        # Encoded in one go, as all other programs do it; apart where that would read text as control tokens, or where
        # a token would reach over the border of prompt and response.
        for apart in [True] if self._looks_special(whole) else [False, True]:
            prompt = self._rendered(messages, add_generation_prompt=True, apart=apart)
            full = self._rendered(whole, add_generation_prompt=False, apart=apart)
            rest = full[len(prompt) :]
            if full[: len(prompt)] == prompt and self._tokens.eos_id in rest:
                return rest[: len(rest) - rest[::-1].index(self._tokens.eos_id)]  # text after EOS is never generated
        raise InputError(
            "The tokenizer's chat template does not give the prompt, then the response, then the end of "
            "sequence. Use model.template: llama-2, or another tokenizer."
        )

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the number of tokens of each single-turn prompt, and of each response to it (EOS included)."""
        lengths: tuple[list[int], list[int]] = ([], [])
        for prompt, response in zip(prompts, responses, strict=True):
            messages = [{"role": "user", "content": prompt}]
            lengths[0].append(len(self.prompt_ids(messages)))
            lengths[1].append(len(self.response_ids(messages, response)))
        return lengths

    def bos_problem(self, ids: Sequence[int]) -> str | None:
        """Return a sentence where the row has several BOS tokens; a chat template may do without one."""
        begins = list(ids).count(self._tokens.bos_id) if self._tokens.bos_id is not None else 0
        if begins > 1 and self._tokens.bos_id != self._tokens.eos_id:
            return f"{begins} BOS tokens, where one is due at most"
        return None

    def _looks_special(self, messages: Sequence[Message]) -> bool:
        return any(token in message["content"] for token in self._tokenizer.special_tokens() for message in messages)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool, apart: bool) -> list[int]:
        """Return the ids of the rendered text; `apart`: each message's content is encoded by itself, as plain text."""
        contents = [message["content"] for message in messages]
        if not apart:
            return self._tokenizer.encode([self._text(messages, contents, add_generation_prompt)], specials=True)[0]
        # Private-use characters stand for the contents, so that the template's own text is told from theirs.
        marks = [chr(0xE000 + i) for i in range(len(contents))]
        ids: list[int] = []
        rest = self._text(messages, marks, add_generation_prompt)
        for mark, content in zip(marks, contents, strict=True):
            before, _, rest = rest.partition(mark)
            ids += self._tokenizer.encode([before], specials=True)[0] + self._tokenizer.encode([content])[0]
        return ids + self._tokenizer.encode([rest], specials=True)[0]

    def _text(self, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool) -> str:
        filled = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return self._template.render(
            filled,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._tokens.bos,
            eos_token=self._tokens.eos,
        )
