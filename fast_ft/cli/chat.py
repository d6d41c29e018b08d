"""Talk to a run's adapter in the terminal; the answer appears as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from fast_ft.common import out_of_memory, seeds
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import harmless, whole
from fast_ft.common.wording import counted
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import prepare
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.generate.engine_setup import Engine, engine_over, goes_general_way, library_engine
from fast_ft.pipeline.adapter_loading import Ready, load
from fast_ft.pipeline.rerun import open_run
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe.schema import Generate

_BURST = 4  #: tokens between two looks: few enough to read along


def chat(
    root: str | Path, overrides: list[str], *, ask: Callable[[str], str] | None = None, out: TextIO = sys.stdout
) -> None:
    """Read prompts with `ask` (default: a line of stdin) until it raises EOFError, and write answers to `out`."""
    ask = ask or _stdin()
    folder, recipe = open_run(root, overrides)
    prepared = prepare(recipe)
    ready = load(folder, recipe, prepared, folder.adapter)
    context = ready.loaded.model.config.max_position_embeddings
    room = _Room(ready, prepared.encoder, recipe.generate, context)
    note("An empty line forgets what was said; Ctrl-D leaves.")
    messages: list[dict[str, str]] = []
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
            note(f"That has {counted(len(ids), 'token')}; the model's context is {context}.")
            messages = []
            continue
        row = Sequence(ids, min(most, context - len(ids)), seeds.derive(recipe.seed, "chat", turn))
        answer = _answer(room.engine(len(ids) + row.limit), row, prepared.encoder, out)
        messages.append({"role": "assistant", "content": answer})


class _Room:
    """An engine for one answer, which grows with the talk: a long context's whole cache would not fit."""

    def __init__(self, ready: Ready, encoder: Encoder, section: Generate, context: int) -> None:
        self._encoder, self._section, self._context = encoder, section, context
        self._engine: Engine | None = None
        self._model: FusedModel | None = None
        if goes_general_way(ready.loaded):
            self._engine = library_engine(ready.loaded, encoder, section, 1, context)
        else:
            self._model = FusedModel(ready.loaded.model, dequantise=ready.plan.dequantise, step_rows=(1,))

    def engine(self, tokens: int) -> Engine:
        """Return an engine for `tokens` tokens, at most the context's: the former one, or one twice as long."""
        longest = self._engine.config.longest if self._engine is not None else 0
        if self._model is not None and longest < tokens:
            longest = min(self._context, max(tokens, 2 * longest))
            self._engine = None  # its memory is free for the next one
            with out_of_memory.explained(f"making room for {longest} tokens", out_of_memory.ANSWERING):
                self._engine = engine_over(self._model, self._encoder, self._section, DecodePlan(slots=1), longest)
        assert self._engine is not None, "there is a token at least"
        return self._engine


def _stdin() -> Callable[[str], str]:
    """Return `input`, for which bytes that are no UTF-8 are parts of characters; InputError where stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("chat reads what you say from stdin, which is closed: start chat in a terminal")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return input


def _answer(engine: Engine, row: Sequence, encoder: Encoder, out: TextIO) -> str:
    """Write the row's answer as it grows, and return it."""
    shown = ""

    def show(live: list[Sequence]) -> None:
        """Print what the answer has grown by."""
        nonlocal shown
        text = encoder.decode(row.tokens)
        if not text.endswith("\ufffd") and text.startswith(shown):  # else half of a character
            print(harmless(text[len(shown) :]), end="", flush=True, file=out)
            shown = text

    list(engine.run([row], burst=_BURST, on_look=show))
    text = encoder.decode(row.tokens)
    print(harmless(text[len(shown) :]) if text.startswith(shown) else "", file=out)
    if row.tokens[-1] not in encoder.end_ids:
        note(f"(cut off after {counted(len(row.tokens), 'token')})")
    return text
