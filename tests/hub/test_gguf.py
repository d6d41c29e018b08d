"""A .gguf file as base model: written by the `gguf` package from a small model and tokenizer of our own, then read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fast_ft.common.errors import InputError
from fast_ft.data.encoding import Encoder
from fast_ft.hub import download, fingerprint, gguf_base
from fast_ft.recipe import key_owners
from tests.helpers.parts import ROOT

TEXTS = [m["content"] for row in json.loads((ROOT / "recipes/smollm/train.json").read_text()) for m in row["messages"]]
TRICKY = [
    "Lamp lit,  3 boats and 1234 gulls.",
    "don't\n\n  stop <|im_end|> ",
    "Ünïcödé 日本 ▁ \U0001f6a2",
    "  two  ",
    "",
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=420, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rope_theta=50_000.0, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, model: LlamaForCausalLM, byte_pairs: Tokenizer) -> Make:
    def make(
        *, architecture: str = "llama", template: str = CHATML, tensors: tuple[str, ...] = (), **values: Any
    ) -> Path:
        """Write model.gguf; values: other metadata, with __ for each dot; None leaves a key out."""
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        vocabulary = sorted(byte_pairs.get_vocab().items(), key=lambda item: item[1])
        config, state = model.config, json.loads(byte_pairs.to_str())["model"]
        found: dict[str, Any] = {
            f"{architecture}.embedding_length": config.hidden_size, f"{architecture}.block_count": 2,
            f"{architecture}.feed_forward_length": config.intermediate_size, f"{architecture}.context_length": 128,
            f"{architecture}.attention.head_count": 4, f"{architecture}.attention.head_count_kv": 2,
            f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{architecture}.rope.freq_base": 50_000.0, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
            "tokenizer.ggml.token_type": [3 if token in CONTROLS else 1 for token, _ in vocabulary],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": template,
        } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
        for key, value in found.items():
            if value is not None:
                add = {
                    str: writer.add_string,
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    list: writer.add_array,
                }
                add[type(value)](key, value)
        for name, array in _tensors(model):
            quantised = (
                gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                if "ffn" in name and array.ndim > 1
                else None
            )
            if quantised is None:
                writer.add_tensor(name, array)
            else:
                writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        for name in tensors:
            writer.add_tensor(name, np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _tensors(model: LlamaForCausalLM) -> list[tuple[str, np.ndarray]]:
    """Return the tensors as llama.cpp's converter writes them: q and k by neighbours that are turned together."""
    names = {ours: theirs for theirs, ours in gguf_base.TENSORS.items()}
    found = []
    for name, weight in model.state_dict().items():
        inner = name.removesuffix(".weight")
        if inner == "lm_head":
            continue
        block = inner.split(".")[2] if inner.startswith("model.layers.") else None
        theirs = names[inner.split(".", 3)[3] if block else inner]
        array = weight.numpy()
        if theirs in ("attn_q", "attn_k"):
            heads = 4 if theirs == "attn_q" else 2
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found.append((f"{f'blk.{block}.' if block else ''}{theirs}.weight", np.ascontiguousarray(array)))
    return found


def test_the_model_computes_what_it_did(made: Make, model: LlamaForCausalLM) -> None:
    folder = download.model_folder(str(made()))
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=2e-3, rtol=0.02)  # 8 bits in ffn
    assert read.config.rope_parameters["rope_theta"] == 50_000.0 and read.config.tie_word_embeddings
    assert (read.config.bos_token_id, read.config.eos_token_id, read.config.pad_token_id) == (1, 2, 2)
    assert read.generation_config.eos_token_id == 2


def test_the_tokenizer_gives_the_ids_it_did(made: Make, byte_pairs: Tokenizer) -> None:
    folder = download.tokenizer_folder(str(made()))
    encoder, theirs = Encoder(folder, "tokenizer"), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS[:40], *TRICKY]:
        expected = byte_pairs.encode(text).ids
        assert theirs(text).input_ids == expected
        assert theirs.decode(expected) == text
        byte_pairs.encode_special_tokens = True
        assert encoder.tokenizer.encode([text])[0] == byte_pairs.encode(text).ids, "text stays text"
        byte_pairs.encode_special_tokens = False
    assert theirs.eos_token == "<|im_end|>" and encoder.eos_id == 2, "transformers' own reader names <|im_start|>"
    assert (folder / "chat_template.jinja").read_text() == CHATML


def test_a_sentencepiece_vocabulary_gives_the_ids_it_did(made: Make, tmp_path: Path) -> None:
    import sentencepiece

    text, prefix = tmp_path / "text", str(tmp_path / "spm")
    text.write_text("\n".join(line for each in TEXTS for line in each.splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=prefix, vocab_size=420, model_type="bpe", byte_fallback=True, minloglevel=9,
        normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = range(len(own))
    kind = [2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 1 for i in pieces]
    folder = download.tokenizer_folder(
        str(
            made(
                template="", tokenizer__ggml__model="llama", tokenizer__ggml__pre=None, tokenizer__ggml__merges=None,
                tokenizer__ggml__tokens=[own.id_to_piece(i) for i in pieces], tokenizer__ggml__token_type=kind,
                tokenizer__ggml__scores=[float(own.get_score(i)) for i in pieces],
                tokenizer__ggml__padding_token_id=None,
            )
        )
    )  # fmt: skip
    encoder = Encoder(folder, "llama-2")
    for each in [*TEXTS[:40], *TRICKY]:
        assert encoder.tokenizer.encode([each])[0] == own.encode(each)
    assert (encoder.bos_id, encoder.eos_id) == (1, 2)


def test_a_file_is_converted_once_and_anew_when_it_changed(made: Make) -> None:
    path = made()
    first = download.model_folder(str(path))
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert download.model_folder(str(path)) == download.tokenizer_folder(str(path)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert first.parent == gguf_base.cache() and fingerprint.model(str(path), None)["commit"] is None
    other = download.model_folder(str(made(tokenizer__ggml__padding_token_id=0)))
    assert other != first and json.loads((other / "config.json").read_text())["pad_token_id"] == 0


def test_large_models_are_written_in_parts(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AutoModelForCausalLM.from_pretrained(download.model_folder(str(made()))).state_dict()
    monkeypatch.setattr(gguf_base, "_SHARD", 30_000)
    monkeypatch.setattr(gguf_base, "_FORM", 99)
    folder = download.model_folder(str(made()))
    assert len(list(folder.glob("*.safetensors"))) > 3
    parts = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole) and parts.keys() == whole.keys()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"architecture": "gemma2"}, "its architecture is 'gemma2'; .gguf files of llama, qwen2 are read"),
        ({"tensors": ("rope_freqs.weight",)}, "scales its rotary positions"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its rotary positions"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"tensors": ("blk.0.attn_q_norm.weight",)}, "holds a tensor 'blk.0.attn_q_norm.weight'"),
        ({"tokenizer__ggml__pre": "tekken"}, "in a way named 'tekken'; gpt-2, smollm, llama-bpe, qwen2 are read"),
        ({"tokenizer__ggml__model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"tokenizer__ggml__eos_token_id": 4200}, "its eos token is 4200, and its vocabulary has 420 tokens"),
        ({"tokenizer__ggml__eos_token_id": None}, "names no token that ends an answer"),
        ({"llama__context_length": None}, "says no llama.context_length"),
    ],
)
def test_what_is_not_known_is_refused_and_nothing_is_left(made: Make, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        download.model_folder(str(made(**values)))
    assert not list(gguf_base.cache().glob("*/*"))


def test_a_file_that_is_cut_short_or_is_no_gguf_is_refused(made: Make) -> None:
    path = made()
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[:100], whole[:-2000], b"PK" + whole):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is no readable \.gguf file"):
            download.model_folder(str(path))
    with pytest.raises(InputError, match=r"there is no file gone\.gguf here .* check the spelling$"):
        download.model_folder("gone.gguf")
    with pytest.raises(InputError, match="or fetch it: make smollm"):
        download.model_folder(f"gone/{gguf_base.SMOLLM}")


def test_without_the_package_the_message_says_what_to_install(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        InputError, match="needs the gguf package, which is not installed: python -m pip install gguf==0"
    ):
        download.model_folder(str(path))


def test_an_eos_that_the_template_never_writes_gives_way_to_the_end_of_turn(
    made: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = download.model_folder(str(made(tokenizer__ggml__eos_token_id=0, tokenizer__ggml__eot_token_id=2)))
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    assert "answers end with <|im_end|>, as its chat template ends them" in capsys.readouterr().err
    download.model_folder(str(made(tokenizer__ggml__eos_token_id=0)))
    assert "warning:" in capsys.readouterr().err


def test_a_gguf_file_is_a_place_of_the_machine_and_nothing_is_converted_for_a_report(made: Make) -> None:
    path = made()
    assert not key_owners.is_hub_id("models/model.gguf") and key_owners.is_hub_id("models/model")
    with download.nothing_fetched(), pytest.raises(InputError, match="was not converted yet"):
        download.model_folder(str(path))
    folder = download.model_folder(str(path))
    with download.nothing_fetched():
        assert download.model_folder(str(path)) == folder
