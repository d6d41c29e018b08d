"""Text to ids and back, without torch: tokenizer.json by `tokenizers`, a bare tokenizer.model by `sentencepiece`.

A control token is written into a text by `marked`. A row's own text is never searched for control tokens: "</s>" in a
row is four characters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

MOST_TOKENIZER = 128 << 20  #: bytes of tokenizer.json or tokenizer.model; large vocabularies take some 30 MB
_MARK = "\U0010fffd"  #: a private-use character, on both sides of a control token's name


def marked(token: str) -> str:
    """Return what stands for a control token in the texts of `encode_marked`."""
    return f"{_MARK}{token}{_MARK}"


class Tokenizer(Protocol):
    """Ids from text and back."""

    #: {id: text} of the control tokens.
    controls: dict[int, str]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS."""

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, in which `marked` control tokens stand for themselves."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens left out."""

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None where the vocabulary has none like it."""

    def added_tokens(self) -> list[str]:
        """Return the texts of tokens that were added to the vocabulary and are no control tokens."""


class _TokenizerJson:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: Path, added: Mapping[str, int], named: Iterable[str]) -> None:
        import tokenizers

        try:
            self._plain = tokenizers.Tokenizer.from_file(str(path))
            self._marking = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path}: not a readable tokenizer ({error}). Fetch the tokenizer again.") from None
        for each in (self._plain, self._marking):
            for token, id_ in sorted(added.items(), key=lambda item: item[1]):
                if each.token_to_id(token) is None and id_ == each.get_vocab_size():  # else it would get another id
                    each.add_special_tokens([token])
            each.add_special_tokens(sorted({token for token in named if each.token_to_id(token) is not None}))
            each.encode_special_tokens = True  # "</s>" in a row is four characters, not the end
            each.no_padding()  # a tokenizer.json may carry its trainer's settings
            each.no_truncation()
        known = self._plain.get_added_tokens_decoder()
        self.controls = {id_: token.content for id_, token in known.items() if token.special}
        self._added = [token.content for token in known.values() if not token.special]
        aliases = [
            tokenizers.AddedToken(
                marked(token.content), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False
            )
            for token in map(known.__getitem__, self.controls)
        ]
        self._marking.add_tokens(aliases)  # found in a text as the control tokens are, but never in a row's own
        self._meant = {self._marking.token_to_id(marked(token)): id_ for id_, token in self.controls.items()}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [each.ids for each in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, in which `marked` control tokens stand for themselves."""
        found = self._marking.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self._meant.get(id_, id_) for id_ in each.ids] for each in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens left out."""
        return self._plain.decode([id_ for id_ in ids if id_ not in self.controls])

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None."""
        return self._plain.token_to_id(token)

    def added_tokens(self) -> list[str]:
        """Return the texts of added tokens that are no control tokens."""
        return self._added


class _SentencePiece:
    """A bare tokenizer.model, as Llama 2 was published with; its control tokens never match text."""

    def __init__(self, path: Path, added: Mapping[str, int], named: Iterable[str]) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a readable tokenizer ({error}). Fetch the tokenizer again.") from None
        own = {i: self._model.id_to_piece(i) for i in range(len(self._model)) if self._model.is_control(i)}
        self._ids = {token: id_ for token, id_ in added.items() if id_ >= len(self._model)}
        self.controls = own | {id_: token for token, id_ in self._ids.items()}
        self.controls |= {id_: token for token in named if (id_ := self._piece_id(token)) is not None}
        self._meant = {marked(token): id_ for id_, token in self.controls.items()}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._model.encode(list(texts))

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, in which `marked` control tokens stand for themselves."""
        border = re.compile("(" + "|".join(map(re.escape, self._meant)) + ")")
        return [[id_ for part in border.split(text) if part for id_ in self._ids_of(part)] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens are left out, and ids above the pieces, which a model may have."""
        return self._model.decode([i for i in ids if i < len(self._model) and i not in self.controls])

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None."""
        return self._ids.get(token, self._piece_id(token))

    def added_tokens(self) -> list[str]:
        """Return nothing: every token that was added to such a vocabulary counts as a control token."""
        return []

    def _ids_of(self, part: str) -> list[int]:
        return [self._meant[part]] if part in self._meant else self._model.encode(part)

    def _piece_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None


@functools.lru_cache(maxsize=4)
def _opened(
    kind: Callable[..., Tokenizer], path: Path, state: tuple[int, ...], added: tuple[tuple[str, int], ...],
    named: tuple[str, ...],
) -> Tokenizer:  # fmt: skip
    """Return the tokenizer of a file, read once a process for each state of it. What was read never changes."""
    return kind(path, dict(added), named)


def open_tokenizer(folder: Path, added: Mapping[str, int], named: Iterable[str]) -> Tokenizer:
    """Return the tokenizer in a folder. InputError where there is none, or one that cannot be read.

    added: {token: id} of added_tokens.json. named: tokens that the folder's other files call control tokens.
    """
    for name, kind in (("tokenizer.json", _TokenizerJson), ("tokenizer.model", _SentencePiece)):
        if (folder / name).is_file():
            untrusted_files.check_size(folder / name, MOST_TOKENIZER)
            state = untrusted_files.state_of(folder / name)
            return _opened(kind, folder / name, state, tuple(added.items()), tuple(named))
    raise InputError(
        f"{folder}: no tokenizer here. A tokenizer.json or a tokenizer.model is needed; "
        "set model.tokenizer to a folder or hub id that has one."
    )
