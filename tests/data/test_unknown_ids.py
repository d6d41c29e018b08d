"""A model may know more ids than its tokenizer has pieces: padded vocabularies, tokens that were never added."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from fast_ft.data.encoding import Encoder
from tests.helpers.parts import COLOURS, POCKET, THINGS


def test_ids_above_sentencepieces_pieces_are_left_out(tmp_path: Path) -> None:
    import sentencepiece

    lines = [f"The {thing} is {colour}." for thing in THINGS for colour in COLOURS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    encoder = Encoder(tmp_path)
    ids = encoder.tokenizer.encode(["The door is red."])[0]
    assert max(ids) < 60
    assert encoder.decode([*ids[:4], 60, *ids[4:], 32_063]) == "The door is red."


@pytest.mark.parametrize("ids", [[2048], [5, 2048, 99_999]])
def test_ids_above_a_tokenizer_jsons_are_left_out(ids: list[int]) -> None:
    encoder = Encoder(POCKET)
    assert encoder.decode(ids) == encoder.decode([each for each in ids if each < 2048])
