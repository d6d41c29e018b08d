"""Messages, a training row, a prompt, and all rows of a data set: the values that this room's steps hand on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fast_ft.recipe.schema import SourceFile

#: Columns of Pool.table that are no metrics.
TEXT_COLUMNS = ("id", "messages", "prompt", "response")
BLANK_LINE = "\n\n"  #: between turns, where several of them are shown or measured as one text


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `trained` says whether its tokens have a loss.

    `more` holds what else a chat template may render, as the row has it: name, tool_calls, reasoning_content, ...
    """

    role: str
    content: str
    trained: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the turn says: its content, or where it only calls tools, the calls as JSON."""
        calls = self.more.get("tool_calls") or self.more.get("function_call")
        return self.content or (json.dumps(calls, ensure_ascii=False) if calls else "")

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as a chat template takes it, and as pred.json has it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True, slots=True)
class Example:
    """A training row. `score` is the data set's own quality score, or None; `tools` are the functions it may call."""

    id: str
    messages: tuple[Message, ...]
    score: float | None
    tools: tuple[Any, ...] = ()

    @classmethod
    def exchange(cls, id: str, prompt: str, response: str, score: float | None = None) -> Example:
        """Return a row of one question and one trained answer."""
        return cls(id, (Message("user", prompt), Message("assistant", response, trained=True)), score)

    @property
    def prompt(self) -> str:
        """The texts of all system and user turns, a blank line between."""
        return BLANK_LINE.join([each.content for each in self.messages if each.role in ("system", "user")])

    @property
    def response(self) -> str:
        """The texts of the trained turns, a blank line between."""
        return BLANK_LINE.join([each.text for each in self.messages if each.trained])

    @property
    def is_exchange(self) -> bool:
        """Whether the row is one question, one trained answer, and nothing else."""
        shape = [(each.role, each.trained, bool(each.more)) for each in self.messages]
        return shape == [("user", False, False), ("assistant", True, False)] and not self.tools

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of the row's content: the same in every layout, whatever the id.

        An exchange is {prompt, response}; any other row is its messages, what is trained and its tools.
        """
        if self.is_exchange:
            content: Any = {"prompt": self.prompt, "response": self.response}
        else:
            content = [[[m.role, m.content, m.trained, dict(m.more)] for m in self.messages], list(self.tools)]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer: turns of role and content (and what else they have), the last of them the user's."""

    id: str
    messages: tuple[dict[str, Any], ...]
    skill: str | None = None
    difficulty: float | None = None
    tools: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]

    @property
    def all_text(self) -> str:
        """The texts of all system and user turns, a blank line between, as Example.prompt."""
        return BLANK_LINE.join([turn["content"] for turn in self.messages if turn["role"] in ("system", "user")])


@dataclass(frozen=True)
class Pool:
    """All rows of a data set, in file order.

    table: columns id, messages, prompt, response (strings), score (float64, null where absent), then metrics.
    `messages` is JSON. It is null where the row is an exchange, whose prompt and response say all of it, and may be
    absent where all rows are. A response may be "" (Alpaca has such rows); selection leaves those out. source: as the
    user gave it. digest: sha256 over the files. notes: what of the files is not used, in sentences. sources: where the
    rows come from; the column "source" says of each row, which of them. Both are data/mixing.py's.
    """

    table: pa.Table
    source: str
    digest: str
    notes: tuple[str, ...] = ()
    sources: tuple[SourceFile, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def weights(self, indices: Sequence[int]) -> list[float]:
        """Return how often an epoch sees the rows at these positions."""
        if "source" not in self.table.column_names:
            return [1.0] * len(indices)
        found = self.table["source"].take(pa.array(indices, pa.int64())).to_pylist()
        return [self.sources[index].weight for index in found]

    @property
    def metrics(self) -> list[str]:
        """The names of the columns that are metrics, `score` among them."""
        return [name for name in self.table.column_names if name not in (*TEXT_COLUMNS, "source")]

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Return the rows at these positions (from 0), in the given order."""
        names = [name for name in (*TEXT_COLUMNS, "score") if name in self.table.column_names]
        rows = self.table.select(names).take(pa.array(indices, pa.int64()))
        return [_example(**row) for row in rows.to_pylist()]

    def exchanges(self) -> list[bool]:
        """Return of each row whether it is an exchange."""
        if "messages" not in self.table.column_names:
            return [True] * len(self)
        return self.table["messages"].is_null().to_pylist()


def packed(example: Example) -> str | None:
    """Return what the column `messages` holds for a row."""
    if example.is_exchange:
        return None
    turns = [[m.role, m.content, m.trained, *([m.more] if m.more else [])] for m in example.messages]
    return json.dumps([turns, example.tools], ensure_ascii=False, separators=(",", ":"), default=str)


def _example(id: str, prompt: str, response: str, score: float | None, messages: str | None = None) -> Example:
    if messages is None:
        return Example.exchange(id, prompt, response, score)
    turns, tools = json.loads(messages)
    return Example(id, tuple(Message(*turn) for turn in turns), score, tuple(tools))
