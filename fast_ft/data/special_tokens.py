"""A tokenizer's control tokens: what its files call the beginning, the end and the padding of a sequence.

tokenizer_config.json is asked first, then special_tokens_map.json. added_tokens.json may hold tokens that the
vocabulary itself lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.tokenizer import Tokenizer

_REMEDY = "Fetch the tokenizer again."


@dataclass(frozen=True)
class TokenizerFiles:
    """What lies beside a tokenizer's vocabulary.

    config: tokenizer_config.json. named: {"bos_token": text, ...}, as chat templates get it. added: {text: id}.
    """

    folder: Path
    config: Mapping[str, Any]
    named: Mapping[str, str]
    added: Mapping[str, int]

    @property
    def controls(self) -> list[str]:
        """The texts of the tokens that are named as control tokens; one for unknown text is none."""
        lists = [self.config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
        items = [each for more in lists for each in (more.values() if isinstance(more, dict) else more)]
        extra = [text for each in items if (text := _text(each))]
        return [text for key, text in self.named.items() if key != "unk_token"] + extra


def read(folder: Path) -> TokenizerFiles:
    """Read a tokenizer's folder; a file that is not there says nothing. Raises InputError."""
    config, tokens_map, added = (
        untrusted_files.json_object(folder / name, remedy=_REMEDY) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    keys = [key for key in {**config, **tokens_map} if key.endswith("_token")]
    named = {key: text for key in keys if (text := _text(config.get(key)) or _text(tokens_map.get(key)))}
    for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>")):  # as transformers has it for Llama
        if key not in config and key not in tokens_map:
            named[key] = usual
    decoder = config.get("added_tokens_decoder")
    for id_, token in decoder.items() if isinstance(decoder, dict) else ():
        if id_.isdecimal() and (text := _text(token)):
            added.setdefault(text, int(id_))
    if wrong := [token for token, id_ in added.items() if not isinstance(id_, int) or isinstance(id_, bool)]:
        raise InputError(f"{folder / 'added_tokens.json'}: the id of {wrong[0]!r} is no whole number. {_REMEDY}")
    return TokenizerFiles(folder, config, named, added)


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that begin, end and fill up a sequence, with their ids. bos_id is None where there is no BOS."""

    bos: str | None
    eos: str
    bos_id: int | None
    eos_id: int

    @classmethod
    def of(cls, files: TokenizerFiles, tokenizer: Tokenizer) -> SpecialTokens:
        """Return a tokenizer's BOS and EOS. Raises InputError where its EOS is not in its vocabulary."""
        bos, eos = files.named.get("bos_token", "<s>"), files.named.get("eos_token", "</s>")
        eos_id = tokenizer.token_id(eos)
        if eos_id is None:
            raise InputError(
                f"{files.folder}: its end-of-sequence token {eos!r} is not in its vocabulary. "
                "Set eos_token in tokenizer_config.json to the token that ends a turn."
            )
        return cls(bos, eos, tokenizer.token_id(bos), eos_id)


def pad_id(files: TokenizerFiles, tokenizer: Tokenizer, ends: Collection[int]) -> int:
    """Return the id that fills rows up: <unk> where there is one, and never a token that ends an answer.

    A pad that is EOS would be masked together with the padding elsewhere, and the model would not learn to stop.
    """
    texts = ["<unk>", files.named.get("pad_token"), files.named.get("unk_token")]
    known = [tokenizer.token_id(text) for text in texts if text]
    return next(i for i in (*known, *range(len(ends) + 1)) if i is not None and i not in ends)


def _text(value: Any) -> str | None:
    """Return a token's text: a string, or an object with the text as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None
