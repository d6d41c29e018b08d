"""Text to ids and back, without torch: tokenizer.json by `tokenizers`, a bare tokenizer.model by `sentencepiece`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

MOST_TOKENIZER = 128 << 20  #: bytes of tokenizer.json or tokenizer.model; large vocabularies take some 30 MB


class Tokenizer(Protocol):
    """Ids from text and back."""

    def encode(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS; specials: control tokens in a text count as such."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens left out."""

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None where the vocabulary has none like it."""

    def special_tokens(self) -> list[str]:
        """Return the texts of the control tokens."""


class _TokenizerJson:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._plain = tokenizers.Tokenizer.from_file(str(path))
            self._parsing = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path}: not a readable tokenizer ({error}). Fetch the tokenizer again.") from None
        self._plain.encode_special_tokens = True  # "</s>" in a row is four characters, not the end
        for each in (self._plain, self._parsing):  # a tokenizer.json may carry its trainer's settings
            each.no_padding()
            each.no_truncation()

    def encode(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Return the ids of each text; specials: control tokens in a text count as such."""
        tokenizer = self._parsing if specials else self._plain
        return [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens left out."""
        return self._plain.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None."""
        return self._plain.token_to_id(token)

    def special_tokens(self) -> list[str]:
        """Return the texts of the control tokens."""
        return [token.content for token in self._plain.get_added_tokens_decoder().values() if token.special]


class _SentencePiece:
    """A bare tokenizer.model, as Llama 2 was published with; its control tokens never match text."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a readable tokenizer ({error}). Fetch the tokenizer again.") from None

    def encode(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Return the ids of each text. Raises InputError for specials, which this format cannot parse in a text."""
        if specials:
            raise InputError(
                "model.template: 'tokenizer' needs a tokenizer.json; this folder has a tokenizer.model alone. "
                "Use template: llama-2, or convert the tokenizer."
            )
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens are left out, and ids above the pieces, which a model may have."""
        return self._model.decode([i for i in ids if i < len(self._model) and not self._model.is_control(i)])

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, or None."""
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def special_tokens(self) -> list[str]:
        """Return the texts of the control tokens."""
        return [self._model.id_to_piece(i) for i in range(len(self._model)) if self._model.is_control(i)]


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a folder. InputError where there is none, or one that cannot be read."""
    for name, kind in (("tokenizer.json", _TokenizerJson), ("tokenizer.model", _SentencePiece)):
        if (folder / name).is_file():
            untrusted_files.check_size(folder / name, MOST_TOKENIZER)
            return kind(folder / name)
    raise InputError(
        f"{folder}: no tokenizer here. A tokenizer.json or a tokenizer.model is needed; "
        "set model.tokenizer to a folder or hub id that has one."
    )
