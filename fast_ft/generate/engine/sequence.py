"""One answer that is being made: its prompt, its tokens so far, and the pages that hold their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """At most `limit` tokens after `prompt`, drawn by `key`. `known` is the answer's length where a run is replayed.

    `limit` may be lowered at any time; an answer that is longer by then is cut to it. `block_table` lists the pages of
    the sequence's tokens, in their order; the first ones may be shared with other sequences.
    """

    prompt: list[int]
    limit: int
    key: int = 0
    known: int | None = None
    tokens: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)

    def length(self, more: int = 0) -> int:
        """Return the tokens of prompt and answer, `more` answer tokens further on, up to the limit."""
        return len(self.prompt) + min(len(self.tokens) + more, self.limit)

    @property
    def end(self) -> int:
        """The length at which the answer ends, if EOS does not end it before."""
        return self.limit if self.known is None else min(self.known, self.limit)

    def add(self, tokens: list[int], placeholder: int) -> None:
        """Add new tokens to the answer; a replayed answer gets placeholders, since its text is known already."""
        self.tokens += tokens if self.known is None else [placeholder] * len(tokens)
