"""Talk to a run's adapter in the terminal, and to the base model beside it; an answer appears as it is made."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

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
_HELP = """\
/base            the base model answers too, before the tuned one; again: the tuned one alone
/system TEXT     begin again with this system turn; without TEXT: with none
/temperature X   draw tokens at this temperature; 0: take the likeliest ones
/help            these lines
An empty line forgets what was said. A text that begins with / is written with //. Ctrl-D leaves."""


def chat(
    root: str | Path, overrides: list[str], *, ask: Callable[[str], str] | None = None, out: TextIO = sys.stdout
) -> None:
    """Read prompts with `ask` (default: a line of stdin) until it raises EOFError, and write answers to `out`."""
    ask = ask or _stdin()
    folder, recipe = open_run(root, overrides)
    prepared = prepare(recipe)
    ready = load(folder, recipe, prepared, folder.adapter)
    talk = _Talk(ready, prepared.encoder, recipe.generate, recipe.seed, out)
    note("An empty line forgets what was said; /help lists the commands; Ctrl-D leaves.")
    for turn in range(sys.maxsize):
        try:
            text = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if not text:
            talk.forget()
        elif whole(text) != text:
            note("That line holds a part of a character, as some terminals leave it at Backspace. Write it again.")
        elif text.startswith("/") and not text.startswith("//"):
            talk.obey(text)
        else:
            talk.say(text.removeprefix("/") if text.startswith("//") else text, turn)


class _Talk:
    """What was said to the tuned model and, while /base is on, to the base model: each side has its own answers."""

    def __init__(self, ready: Ready, encoder: Encoder, section: Generate, seed: int, out: TextIO) -> None:
        self._ready, self._encoder, self._section, self._seed, self._out = ready, encoder, section, seed, out
        self._context: int = ready.loaded.model.config.max_position_embeddings
        self._system: list[dict[str, str]] = []
        self._tuned = _Side(ready, encoder, self._context, base=False)
        self._base: _Side | None = None

    def forget(self) -> None:
        """Begin again, with the system turn that was given."""
        for side in filter(None, (self._base, self._tuned)):
            side.said = []

    def obey(self, line: str) -> None:
        """Do what a line such as "/system Answer briefly." asks for, and say what holds from now on."""
        word, _, rest = line.partition(" ")
        commands = {"/base": self._toggle_base, "/system": self._set_system, "/temperature": self._set_temperature}
        if word == "/help":
            note(_HELP)
        elif word in commands:
            commands[word](rest.strip())
        else:
            note(f"{word}: there is no such command. /help lists them; a text that begins with / is written with //.")

    def say(self, text: str, turn: int) -> None:
        """Let each side answer. The same `turn` draws the same random numbers."""
        for side, name in ((self._base, "base"), (self._tuned, "tuned")):
            if side is None:
                continue
            if self._base is not None:
                print(f"{name}: ", end="", flush=True, file=self._out)
            with side.active():
                self._answer(side, text, turn)

    def _answer(self, side: _Side, text: str, turn: int) -> None:
        most = self._section.max_new_tokens
        side.said.append({"role": "user", "content": text})
        while len(side.said) > 1 and len(self._ids(side.said)) + most > self._context:
            side.said = side.said[2:]  # the oldest exchange gives way
        ids = self._ids(side.said)
        if len(ids) >= self._context:
            note(f"That has {counted(len(ids), 'token')}; the model's context is {self._context}.")
            side.said = []
            return
        row = Sequence(ids, min(most, self._context - len(ids)), seeds.derive(self._seed, "chat", turn))
        answer = _answer(side.engine(len(ids) + row.limit, self._section), row, self._encoder, self._out)
        side.said.append({"role": "assistant", "content": answer})

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        return self._encoder.prompt_ids([*self._system, *said])

    def _toggle_base(self, rest: str) -> None:
        if rest:
            note(f"/base {rest}: it takes nothing behind it")
        elif self._base is not None:
            self._base = None
            note("The tuned model answers alone.")
        else:
            self._base = _Side(self._ready, self._encoder, self._context, base=True)
            self._base.said = list(self._tuned.said)
            note("The base model answers too, before the tuned one, and remembers its own answers from now on.")

    def _set_system(self, text: str) -> None:
        system = [{"role": "system", "content": text}] if text else []
        try:
            self._encoder.prompt_ids([*system, {"role": "user", "content": "?"}])
        except InputError as error:
            note(f"/system: {error}")
            return
        self._system = system
        self.forget()
        note("A new talk begins, with this system turn." if text else "A new talk begins, without a system turn.")

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            note(f"/temperature {text}: it takes a number, at least 0, such as 0.7")
        elif value == 0:
            self._section = self._section.model_copy(update={"do_sample": False})
            note("The likeliest token is taken each time.")
        else:
            self._section = self._section.model_copy(update={"do_sample": True, "temperature": value})
            note(f"Tokens are drawn at temperature {value:g}.")


class _Side:
    """One of the two models, what was said to it, and its engine.

    The engine grows with the talk: a long context's whole cache would not fit.
    """

    def __init__(self, ready: Ready, encoder: Encoder, context: int, *, base: bool) -> None:
        self.said: list[dict[str, str]] = []
        self._ready, self._encoder, self._context, self._is_base = ready, encoder, context, base
        self._section: Generate | None = None  # of the engine that is there
        self._engine: Engine | None = None
        self._model: FusedModel | None = None
        self._plan = DecodePlan(slots=1, dequantise=ready.plan.dequantise, kv_cache=ready.plan.kv_cache)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Return what switches the adapter off meanwhile, for the base model."""
        return self._ready.loaded.model.disable_adapter() if self._is_base else contextlib.nullcontext()

    def engine(self, tokens: int, section: Generate) -> Engine:
        """Return an engine for `tokens` tokens, at most the context's: the former one, or one twice as long."""
        longest = self._engine.config.longest if self._engine is not None else 0
        if self._engine is None or longest < tokens or section != self._section:
            longest = longest if longest >= tokens else min(self._context, max(tokens, 2 * longest))
            self._engine = None  # its memory is free for the next one
            with out_of_memory.explained(f"making room for {longest} tokens", out_of_memory.ANSWERING):
                self._engine, self._section = self._engine_with_room(longest, section), section
        return self._engine

    def _engine_with_room(self, longest: int, section: Generate) -> Engine:
        """Return a new engine; weights that were dequantised to 16 bits are given up where memory does not do."""
        try:
            return self._new_engine(longest, section)
        except Exception as error:
            if not (out_of_memory.is_short(error) and self._plan.dequantise):
                raise
        self._plan, self._model = replace(self._plan, dequantise=False), None
        out_of_memory.release()
        return self._new_engine(longest, section)

    def _new_engine(self, longest: int, section: Generate) -> Engine:
        loaded = self._ready.loaded
        if goes_general_way(loaded):
            return library_engine(loaded, self._encoder, section, 1, self._context)
        plan = self._plan
        if self._model is None:
            self._model = FusedModel(loaded.model, dequantise=plan.dequantise, step_rows=(1,), kv_bits=plan.kv_bits)
        return engine_over(self._model, self._encoder, section, plan, longest)


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
