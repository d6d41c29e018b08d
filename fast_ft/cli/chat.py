"""Talk to a run's adapter in the terminal; the answer appears as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from fast_ft.common import out_of_memory, seeds
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import harmless, whole
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import prepare
from fast_ft.data.prompt_templates import Message
from fast_ft.generate import answers
from fast_ft.generate.engine.model_runner import Fused
from fast_ft.generate.engine.prefill import Row
from fast_ft.generate.engine.scheduler import Pool
from fast_ft.pipeline.generate_phase import load
from fast_ft.pipeline.rerun import open_run
from fast_ft.recipe.schema import Generate

_BURST = 4  #: tokens between two looks: few enough to read along


def chat(
    root: str | Path, overrides: Sequence[str], *, ask: Callable[[str], str] | None = None, out: TextIO = sys.stdout
) -> None:
    """Read prompts with `ask` (default: a line of stdin) until it raises EOFError, and write answers to `out`."""
    ask = ask or _stdin()
    folder, recipe = open_run(root, overrides)
    prepared = prepare(recipe)
    loaded, settled, _ = load(folder, recipe, prepared, folder.adapter)
    context = loaded.model.config.max_position_embeddings
    fused = Fused(loaded.model, dequantise=settled["dequantise"], step_rows=(1,))
    room = _Room(fused, prepared.encoder, recipe.generate, context)
    note("An empty line forgets what was said; Ctrl-D leaves.")
    messages: list[Message] = []
    for turn in range(sys.maxsize):
        try:
            text = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if not text:
            messages = []
            continue
        if whole(text) != text:
            note("That line holds a part of a character, as some terminals leave it at Backspace. Write it again.")
            continue
        messages.append({"role": "user", "content": text})
        most = recipe.generate.max_new_tokens
        while len(messages) > 1 and len(prepared.encoder.prompt_ids(messages)) + most > context:
            messages = messages[2:]  # the oldest exchange gives way
        ids = prepared.encoder.prompt_ids(messages)
        if len(ids) >= context:
            note(f"That has {len(ids)} tokens; the model's context is {context}.")
            messages = []
            continue
        row = Row(ids, min(most, context - len(ids)), seeds.derive(recipe.seed, "chat", turn))
        answer = _answer(room.pool(len(ids) + row.limit), row, prepared.encoder, out)
        messages.append({"role": "assistant", "content": answer})


class _Room:
    """A pool of one row that grows with the talk: a long context's whole cache would not fit beside the model."""

    def __init__(self, fused: Fused, encoder: Encoder, section: Generate, context: int) -> None:
        self._fused, self._encoder, self._section, self._context = fused, encoder, section, context
        self._pool: Pool | None = None

    def pool(self, tokens: int) -> Pool:
        """Return a pool for so many tokens, at most the context's: the one that is there, or one twice as long."""
        if self._pool is None or self._pool.longest < tokens:
            longest = min(self._context, max(tokens, 2 * (self._pool.longest if self._pool is not None else 0)))
            self._pool = None  # its memory is free for the next one
            with out_of_memory.explained(f"making room for {longest} tokens", out_of_memory.ANSWERING):
                self._pool = answers.pool_over(self._fused, self._encoder, self._section, slots=1, longest=longest)
        return self._pool


def _stdin() -> Callable[[str], str]:
    """Return `input`, for which bytes that are no UTF-8 are parts of characters; InputError where stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("chat reads what you say from stdin, which is closed: start chat in a terminal")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return input


def _answer(pool: Pool, row: Row, encoder: Encoder, out: TextIO) -> str:
    """Write the row's answer as it grows, and return it."""
    shown = ""

    def show(live: list[Row]) -> None:
        """Print what the answer has grown by."""
        nonlocal shown
        text = encoder.decode(row.tokens)
        if not text.endswith("\ufffd") and text.startswith(shown):  # else half of a character
            print(harmless(text[len(shown) :]), end="", flush=True, file=out)
            shown = text

    list(pool.run([row], burst=_BURST, on_look=show))
    text = encoder.decode(row.tokens)
    print(harmless(text[len(shown) :]) if text.startswith(shown) else "", file=out)
    if row.tokens[-1] != pool.eos_id:
        note(f"(cut off after {len(row.tokens)} tokens)")
    return text
