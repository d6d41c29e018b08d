"""The model's own tokenizer is of the class that its folder names, whatever the model's family."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fast_ft.data.encoding import Encoder
from fast_ft.models.loaders.base import open_tokenizer
from tests.helpers.parts import COLOURS, THINGS

TEXT = "[INST] The door is red. [/INST]"


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_bare_sentencepiece_model_gives_sentencepieces_ids_in_each_family(
    family: str, named: str, tmp_path: Path
) -> None:
    import sentencepiece

    lines = [f"[INST] The {thing} is {colour}. [/INST]" for thing in THINGS for colour in COLOURS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode(TEXT)
    assert open_tokenizer(tmp_path)(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert Encoder(tmp_path).tokenizer.encode([TEXT])[0] == expected
