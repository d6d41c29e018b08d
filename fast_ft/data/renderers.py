"""What turns a conversation into text: a tokenizer's own chat templates, and Llama 3.1's form for any tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.jinja_sandbox import SandboxedTemplate
from fast_ft.data.special_tokens import SpecialTokens, TokenizerFiles
from fast_ft.data.tokenizer import Tokenizer


class TokenizersOwn:
    """The chat templates in a tokenizer's folder, each rendered in a process of its own."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._folder, self._named = files.folder, files.named
        self._sources = _sources(files)
        self._compiled = {"default": SandboxedTemplate(self._sources["default"], str(files.folder))}

    def render(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, add_generation_prompt: bool) -> str:
        """Return the text, by the template called tool_use where there are tools and such a template."""
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._compiled:
            self._compiled[name] = SandboxedTemplate(self._sources[name], str(self._folder))
        return self._compiled[name].render(
            turns,
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._named,
        )


class Llama31:
    """Llama 3.1's form, with its date lines, for any tokenizer: headers are text where it has no such tokens.

    A turn ends with <|eot_id|> where the tokenizer has that token, and with its own EOS elsewhere.
    """

    _DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
        self._begin = "" if tokens.bos_id is None else tokens.bos
        self._end = "<|eot_id|>" if tokenizer.token_id("<|eot_id|>") is not None else tokens.eos

    def render(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, add_generation_prompt: bool) -> str:
        """Return the text. It always begins with a system turn; a tool's turn is headed ipython, as Meta has it."""
        system, rest = (turns[0]["content"], turns[1:]) if turns[0]["role"] == "system" else ("", turns)
        text = f"{self._begin}{self._header('system')}{self._DATES}{system}{self._end}"
        for turn in rest:
            text += self._header(turn["role"]) + turn["content"] + self._end
        return text + (self._header("assistant") if add_generation_prompt else "")

    @staticmethod
    def _header(role: str) -> str:
        return f"<|start_header_id|>{'ipython' if role == 'tool' else role}<|end_header_id|>\n\n"


def _sources(files: TokenizerFiles) -> dict[str, str]:
    """Return a folder's chat templates by name, "default" among them. Raises InputError where it has none."""
    remedy = "Use model.template: llama-2."
    path = files.folder / "chat_template.jinja"
    if path.is_file():
        sources: dict[str, Any] = {"default": untrusted_files.text(path)}
        for other in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
            sources[other.stem] = untrusted_files.text(other)
        return sources
    given = files.config.get("chat_template")
    if isinstance(given, list):
        given = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
    sources = given if isinstance(given, dict) else {"default": given}
    sources = {name: source for name, source in sources.items() if isinstance(source, str)}
    if not sources:
        raise InputError(f"{files.folder}: this tokenizer has no chat template. {remedy}")
    if "default" not in sources:
        raise InputError(f"{files.folder}: its chat templates are {', '.join(sources)}, none called default. {remedy}")
    return sources
