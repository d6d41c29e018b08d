"""The model's own tokenizer is of the class that its folder names, whatever the model's family."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from fast_ft.data.encoding import Encoder
from fast_ft.models.loaders import base, choose
from fast_ft.models.loaders.base import open_tokenizer
from fast_ft.recipe import schema
from tests.helpers.parts import COLOURS, POCKET, THINGS

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


def test_it_is_opened_once_it_is_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering never asks for it: the ids are our own."""
    opened: list[Path] = []
    monkeypatch.setattr(base, "open_tokenizer", lambda folder: opened.append(folder) or open_tokenizer(folder))
    model = schema.Model(name_or_path=str(tiny), max_length=64, load_in_4bit=False)
    loaded = choose.make_loader(model, schema.Lora(r=4, lora_alpha=8), seed=1, name="peft").for_training()
    assert opened == []
    assert loaded.tokenizer is loaded.tokenizer and loaded.tokenizer.pad_token != loaded.tokenizer.eos_token
    assert opened == [tiny]


def test_our_own_is_read_again_where_its_file_has_changed(tmp_path: Path) -> None:
    for path in POCKET.glob("*.json"):
        shutil.copy(path, tmp_path)
    before = Encoder(tmp_path)
    assert Encoder(tmp_path).tokenizer is before.tokenizer
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["."], vocabulary["?"] = vocabulary["?"], vocabulary["."]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Encoder(tmp_path).tokenizer.encode(["?"]) == before.tokenizer.encode(["."])
