"""Talk to a run's adapter in the terminal, and to the base model beside it; an answer appears as it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from fast_ft.cli.chat_side import Side
from fast_ft.common import out_of_memory, seeds, signals
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import harmless, whole
from fast_ft.common.wording import counted
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import prepare
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.generate.engine_setup import Engine
from fast_ft.pipeline.adapter_loading import Ready, load
from fast_ft.pipeline.rerun import open_run
from fast_ft.recipe.schema import Generate

_BURST = 4  #: tokens between two looks: few enough to read along
_HELP = """\
/base            the base model answers too, before the tuned one; again: the tuned one alone
/system TEXT     begin again with this system turn; without TEXT: with none
/temperature X   draw tokens at this temperature; 0: take the likeliest ones
/help            these lines
An empty line forgets what was said. A text that begins with / is written with //. Ctrl-C stops an answer; Ctrl-D
leaves."""


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
        self._tuned = Side(ready, encoder, self._context, base=False)
        self._base: Side | None = None

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
        """Let each side answer. The same `turn` draws the same random numbers.

        What was said is kept up to the last whole answer: where memory runs out, this text is as if it was not said.
        """
        for side, name in ((self._base, "base"), (self._tuned, "tuned")):
            if side is None:
                continue
            said = [*side.said, {"role": "user", "content": text}]
            while len(said) > 1 and len(self._ids(said)) + self._section.max_new_tokens > self._context:
                said = said[2:]  # the oldest exchange gives way
            ids = self._ids(said)
            if len(ids) >= self._context:
                note(f"That has {counted(len(ids), 'token')}; the model's context is {self._context}.")
                continue
            answer = self._answer(side, ids, turn, f"{name}: " if self._base is not None else "")
            if answer is None:
                note(self._without_room(len(ids), is_long=len(said) > 1))
            else:
                side.said = [*said, {"role": "assistant", "content": answer}]

    def _answer(self, side: Side, ids: list[int], turn: int, label: str) -> str | None:
        """Write a side's answer to a prompt of these tokens and return it; None where there is no memory for it."""
        limit = min(self._section.max_new_tokens, self._context - len(ids))
        tokens = len(ids) + limit
        while True:
            row = Sequence(ids, limit, seeds.derive(self._seed, "chat", turn))
            print(label, end="", flush=True, file=self._out)
            try:
                with side.active():
                    return _answer(side.engine(tokens, self._section), row, self._encoder, self._out)
            except Exception as error:
                if not out_of_memory.is_short(error):
                    raise
            if label or row.tokens:  # the line was begun
                print(file=self._out)
            if not side.makes_room(tokens):  # outside of the handler, whose error holds the engine
                return None
            note("Memory ran out: the answer begins again, in less memory.")

    def _without_room(self, tokens: int, *, is_long: bool) -> str:
        """Return what to say where memory ran out over the answer to a prompt of `tokens` tokens."""
        ways = ["send an empty line to forget what was said" if is_long else "ask in fewer words"]
        ways += ["write /base to have one model answer"] * (self._base is not None)
        most = self._section.max_new_tokens
        return (
            f"Memory ran out over the answer to {counted(tokens, 'token')}, and the talk goes on as if you had not "
            f"asked: {', '.join(ways)}, or start chat again with a generate.max_new_tokens below {most}."
        )

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        return self._encoder.prompt_ids([*self._system, *said])

    def _toggle_base(self, rest: str) -> None:
        if rest:
            note(f"/base {rest}: it takes nothing behind it")
        elif self._base is not None:
            self._base = None
            note("The tuned model answers alone.")
        else:
            self._base = Side(self._ready, self._encoder, self._context, base=True)
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


def _stdin() -> Callable[[str], str]:
    """Return `input`, for which bytes that are no UTF-8 are parts of characters; InputError where stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("chat reads what you say from stdin, which is closed: start chat in a terminal")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return input


def _answer(engine: Engine, row: Sequence, encoder: Encoder, out: TextIO) -> str:
    """Write the row's answer as it grows, and return it. Ctrl-C ends it where it is."""
    shown, is_stopped = "", False

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True

    def show(live: list[Sequence]) -> None:
        """Print what the answer has grown by."""
        nonlocal shown
        text = encoder.decode(row.tokens)
        if not text.endswith("\ufffd") and text.startswith(shown):  # else half of a character
            print(harmless(text[len(shown) :]), end="", flush=True, file=out)
            shown = text
        if is_stopped:
            row.limit = len(row.tokens)

    with signals.calling(stop, ["SIGINT"]):
        list(engine.run([row], burst=_BURST, on_look=show))
    text = encoder.decode(row.tokens)
    print(harmless(text[len(shown) :]) if text.startswith(shown) else "", file=out)
    if row.tokens[-1] not in encoder.end_ids:
        note(f"({'stopped' if is_stopped else 'cut off'} after {counted(len(row.tokens), 'token')})")
    return text
