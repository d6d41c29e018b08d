"""Any form that begins as text (data/renderers.py): a tokenizer's own chat template, or Llama 3.1's headers.

The text is encoded as a whole, as transformers encodes it. Control tokens in the template's own text are marked
(data/tokenizer.py), so that a row's text is never read as one. Where a token would reach over the border of a prompt
and its answer, both sides of that border are encoded apart: the model meets the prompt alone when it answers.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fast_ft.common.errors import InputError
from fast_ft.data import rendering
from fast_ft.data.examples import Message
from fast_ft.data.prompt_templates import TokenisedConversation, turn_name
from fast_ft.data.rendering import Renderer, Rendering
from fast_ft.data.special_tokens import SpecialTokens
from fast_ft.data.tokenizer import Tokenizer, marked


class _Answer(NamedTuple):
    """Where an assistant turn's tokens lie in the text, in characters, its end token included."""

    turn: int
    start: int
    end: int
    differs: bool  #: whether a later turn changes what stands before it


class ChatTemplate:
    """The form that a renderer's texts have."""

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens, renderer: Renderer) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        self._ids = {text: id_ for id_, text in tokenizer.controls.items()}
        self._controls = _any_of(self._ids)
        self._marks = _any_of(map(marked, self._ids))
        self._added = _any_of(tokenizer.added_tokens())
        self.end_text = self._end_text() or tokens.eos
        self.end_id = self._ids.get(self.end_text, tokens.eos_id)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any]) -> TokenisedConversation:
        """Return the ids of a row. Raises InputError, beginning with the turn, where the form cannot hold it."""
        made = self._rendered(messages, tools, add_generation_prompt=False)
        answers = self._answers(made, messages, tools)
        ids, places = self._tokenised(made, answers)
        turned_on = [messages[answer.turn].trained for answer in answers]
        trained = list(itertools.compress(answers, turned_on))
        return TokenisedConversation(
            ids,
            list(itertools.compress(places, turned_on)),
            [self._spelled(made, answer) for answer in trained],
            [place for place, on in zip(places, turned_on, strict=True) if not on],
            [self._ids[found] for gap in made.gaps for found in self._controls.findall(gap)],
            [answer.differs for answer in trained],
            made.remarks,
        )

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """Return the ids up to where the answer to the last turn begins. Raises InputError likewise."""
        made = self._rendered(messages, tools, add_generation_prompt=True)
        return self._tokenised(made, self._answers(made, messages, tools))[0]

    def count(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return how many tokens each row of one exchange has around its answer, and how many in it."""
        lengths: tuple[list[int], list[int]] = ([], [])
        for prompt, response in zip(prompts, responses, strict=True):
            messages = [Message("user", prompt), Message("assistant", response, trained=True)]
            made = self.conversation(messages, ())
            ((start, end),) = made.trained
            lengths[0].append(len(made.ids) - (end - start))
            lengths[1].append(end - start)
        return lengths

    def _end_text(self) -> str | None:
        """Return the token that ends an answer, or None where the template refuses the simplest conversation."""
        messages = [Message("user", "a"), Message("assistant", "b", trained=True)]
        try:
            made = self._rendered(messages, (), add_generation_prompt=False)
        except InputError:
            return None
        found = self._controls.search(made.gaps[-1]) or self._added.search(made.gaps[-1])
        return found[0] if found else None

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any], *, add_generation_prompt: bool) -> Rendering:
        """Return the text in pieces. Raises InputError where a row's text would be read as a control token."""
        for index, message in enumerate(messages):
            if any(marked(token) in message.content for token in self._ids):
                raise InputError(f"{turn_name(messages, index)}: a text that this program uses for itself. Change it.")
            for field, value in message.more.items():
                if self._controls.search(json.dumps(value, ensure_ascii=False, default=str)):
                    where = f"{turn_name(messages, index)}, {field}"
                    raise InputError(f"{where}: holds the text of a control token, which the template would write.")
        if tools and self._controls.search(json.dumps(list(tools), ensure_ascii=False, default=str)):
            raise InputError("tools: holds the text of a control token, which the template would write. Change it.")
        return rendering.render(self._renderer, messages, tools, add_generation_prompt=add_generation_prompt)

    def _answers(self, made: Rendering, messages: Sequence[Message], tools: Sequence[Any]) -> list[_Answer]:
        """Return where each assistant turn lies. Raises InputError where its beginning or its end cannot be told."""
        answers = []
        whole = made.text
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            numbers = made.texts_of(index)
            turns = [each.turn for each in messages[:index]]
            asked = self._renderer.render(turns, tools, add_generation_prompt=True)
            differs = not whole.startswith(asked)
            if not differs:
                start: int | None = len(asked)
            else:
                start = self._start_after_change(made, messages[:index], tools, numbers)
            if start is not None and numbers:
                before = whole[start : made.gap_at(numbers[0] + 1) - len(made.texts[numbers[0]])]
                start = None if self._controls.search(before) else start
            if start is None:
                raise InputError(
                    f"{turn_name(messages, index)}: the chat template does not give the prompt, then the response: "
                    "what add_generation_prompt adds is not how it begins an answer. Use model.template: llama-2."
                )
            answers.append(_Answer(index, start, self._end(made, messages, index, numbers, start), differs))
        return answers

    def _start_after_change(
        self, made: Rendering, asked: Sequence[Message], tools: Sequence[Any], numbers: list[int]
    ) -> int | None:
        """Return where an answer begins if later turns change what stands before it: after what begins any answer."""
        opening = rendering.render(self._renderer, asked, tools, add_generation_prompt=True).gaps[-1]
        if not numbers or not made.gaps[numbers[0]].startswith(opening):
            return None
        return made.gap_at(numbers[0]) + len(opening)

    def _end(self, made: Rendering, messages: Sequence[Message], index: int, numbers: list[int], start: int) -> int:
        """Return where an answer ends: behind the first control token of the template after its text."""
        number = numbers[-1] + 1 if numbers else sum(made.gap_at(n) <= start for n in range(len(made.gaps))) - 1
        begins = made.gap_at(number)
        gap, skipped = made.gaps[number], max(0, start - begins)
        found = self._controls.search(gap, skipped) or self._added.search(gap, skipped)
        if found is None:
            raise InputError(
                f"{turn_name(messages, index)}: the chat template does not give the prompt, then the response, then a "
                "token that ends it. Use model.template: llama-2, or another tokenizer."
            )
        return begins + found.end()

    def _spelled(self, made: Rendering, answer: _Answer) -> str:
        """Return the text of an answer's tokens, which control tokens have no part in."""
        spelled, at = "", 0
        for gap, text in zip(made.gaps, [*made.texts, ""], strict=True):
            for piece, own in ((gap, True), (text, False)):
                inside = piece[max(0, answer.start - at) : max(0, answer.end - at)]
                spelled += self._controls.sub("", inside) if own else inside
                at += len(piece)
        return spelled.strip()

    def _tokenised(self, made: Rendering, answers: Sequence[_Answer]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids, and where each answer's begin and end."""
        chunks = self._chunks(made, [border for answer in answers for border in (answer.start, answer.end)])
        ids = self._tokenizer.encode_marked(["".join(chunks)])[0]
        places = self._places(ids, chunks)
        if places is None:
            ids, places = self._joined(chunks)
        return ids, list(zip(places[0::2], places[1::2], strict=False))

    def _chunks(self, made: Rendering, borders: Sequence[int]) -> list[str]:
        """Return the text, its control tokens marked, cut at the borders, all of which lie in gaps."""
        chunks = [""]
        at = 0
        for gap, text in zip(made.gaps, [*made.texts, ""], strict=True):
            inside = [border - at for border in borders if at <= border <= at + len(gap)]
            for first, last in zip([0, *inside], [*inside, None], strict=True):
                chunks[-1] += self._controls.sub(lambda found: marked(found[0]), gap[first:last])
                if last is not None:
                    chunks.append("")
            chunks[-1] += text
            at += len(gap) + len(text)
        return chunks

    def _places(self, ids: list[int], chunks: Sequence[str]) -> list[int] | None:
        """Return after which of the ids each chunk but the last ends, or None where a token reaches over a border.

        An answer ends with a control token. It begins after the ids that the text since the last control token has
        without the answer, as the model meets it.
        """
        stops = [place + 1 for place, id_ in enumerate(ids) if id_ in self._tokenizer.controls]
        places: list[int] = []
        passed, last = 0, ""
        for number, chunk in enumerate(chunks):
            found = list(self._marks.finditer(chunk))
            passed, last = passed + len(found), found[-1][0] if found else last
            if passed > len(stops) or number == len(chunks) - 1:
                break
            place = stops[passed - 1] if passed else 0
            if number % 2 == 0:
                opening = self._tokenizer.encode_marked([last + chunk[found[-1].end() if found else 0 :]])[0]
                alone = opening[1:] if last else opening
                if ids[place : place + len(alone)] != alone:
                    return None
                place += len(alone)
            elif not found or found[-1].end() != len(chunk):
                return None
            places.append(place)
        return places if passed == len(stops) else None

    def _joined(self, chunks: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the ids of the chunks' whole text, and after which of them each chunk ends.

        Where the text up to a border gets other ids alone than within the whole, the text is cut at that border.
        """
        cuts: set[int] = set()
        while True:
            ids: list[int] = []
            places: list[int] = []
            wrong: set[int] = set()
            for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), len(chunks)], strict=True):
                encoded = self._tokenizer.encode_marked(["".join(chunks[first : n + 1]) for n in range(first, last)])
                wrong |= {first + n + 1 for n, each in enumerate(encoded) if encoded[-1][: len(each)] != each}
                places += [len(ids) + len(each) for each in encoded]
                ids += encoded[-1]
            if not wrong:
                return ids, places
            cuts |= wrong


def _any_of(texts: Any) -> re.Pattern[str]:
    """Return a pattern that finds any of the texts, the longest first; none where there are none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")
