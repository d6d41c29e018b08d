"""GGUF files: the merged model read back by transformers; the adapter alone; how llama.cpp would split text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from fast_ft.common.errors import InputError
from fast_ft.data.tokenizer import open_tokenizer
from fast_ft.export import gguf_model, gguf_vocabulary, ollama
from fast_ft.export.export import Export
from fast_ft.export.gguf_vocabulary import REGULAR, read_vocabulary
from fast_ft.recipe.schema import Generate
from tests.helpers.parts import POCKET


@pytest.fixture(scope="module")
def tensors(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run's GGUF files as values: {file: {tensor: float32 array, ...}}."""
    exported.gguf("f16")

    def values(path: Path) -> dict[str, np.ndarray]:
        reader = gguf.GGUFReader(str(path))
        return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}

    base = tmp_path_factory.mktemp("base") / "base.gguf"
    gguf_model.write_model(exported.base, base, "f16")
    alone = exported.out / "adapter-lora.gguf"
    scale = gguf.GGUFReader(str(alone)).fields["adapter.lora.alpha"].contents()
    return {"merged": values(exported.out / "model-f16.gguf"), "base": values(base), "adapter": values(alone),
            "alpha": scale}  # fmt: skip


def test_the_adapter_alone_on_the_base_is_the_merged_model(tensors: dict[str, Any]) -> None:
    added = 0
    for name, weight in tensors["merged"].items():
        a, b = (tensors["adapter"].get(f"{name}.lora_{side}") for side in "ab")
        expected = tensors["base"][name]
        if a is not None:
            expected = expected + tensors["alpha"] / len(a) * (b @ a)  # as llama.cpp computes it
            added += 1
        np.testing.assert_allclose(weight, expected, atol=2e-3)
    assert added == 14, "seven layers in each of two blocks"
    with pytest.raises(AssertionError):
        name = "blk.0.attn_q.weight"
        np.testing.assert_allclose(tensors["merged"][name], tensors["base"][name], atol=2e-3)


def test_each_type_is_read_by_transformers_and_near_the_merged_model(exported: Export) -> None:
    model = exported.merged_model()
    ids_BL = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))

    def spoken(**source: Any) -> torch.Tensor:
        place = source.pop("place", model)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(str(place), dtype=torch.float32, **source)
        with torch.no_grad():
            return loaded(ids_BL).logits.log_softmax(-1)

    whole = spoken()
    far = {}
    for outtype in gguf_model.OUTTYPES:
        path = exported.gguf(outtype)
        far[outtype] = (spoken(place=path.parent, gguf_file=path.name) - whole).abs().mean().item()
    assert far["f16"] < 1e-5 < far["q8_0"] < 0.2


def test_heads_in_another_order_are_found(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "neighbours", lambda rows, heads: rows)
    wrong = Export(**{**vars(exported), "out": tmp_path})
    with pytest.raises(InputError, match="was not kept"):
        wrong.gguf("f16")
    assert not list(tmp_path.glob("*.gguf"))


def test_the_vocabulary_of_the_pocket_is_split_as_before_merging_text() -> None:
    found, tokenizer = read_vocabulary(POCKET), open_tokenizer(POCKET, {}, ())
    assert found.model == "llama" and found.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    assert all(tokenizer.token_id(token) == id_ for id_, token in enumerate(found.tokens))
    assert found.kinds[:3] == [gguf_vocabulary.UNKNOWN, gguf_vocabulary.CONTROL, gguf_vocabulary.CONTROL]
    assert (
        found.scores is not None and found.scores[found.tokens.index("he")] > found.scores[found.tokens.index("▁the")]
    )
    assert found.notes, "its pre-tokenizer cuts at punctuation, which llama.cpp's does not"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        *(
            ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}]}, name)
            for regex, name in REGULAR.items()
        ),
        ({"type": "Whitespace"}, None),
    ],
)
def test_byte_level_tokenizers_have_llama_cpps_names(tmp_path: Path, pre: Any, expected: str | None) -> None:
    content = {
        "version": "1.0", "added_tokens": [{"id": 2, "content": "<|end|>", "special": True}], "pre_tokenizer": pre,
        "normalizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}), encoding="utf-8")
    found = read_vocabulary(tmp_path)
    assert found.tokens == ["a", "b", "<|end|>", "ab"] and found.merges == ["a b"] and found.special["eos"] == 2
    assert found.pre == (expected or "default") and bool(found.notes) == (expected is None)


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(exported: Export, tmp_path: Path) -> None:
    model = exported.merged_model()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for change, said in (
        ({"model_type": "phi3"}, "type 'phi3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(InputError, match=said):
            gguf_model.Shape.read(tmp_path)


def test_llama_3s_rope_divides_slow_frequencies() -> None:
    rope = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(
        head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_type": "llama3", **rope}
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(gguf_model._llama3_factors(rope, 128), (plain / theirs).numpy(), rtol=1e-5)


def test_the_modelfile_has_template_ends_and_decoding(exported: Export) -> None:
    text = exported.ollama("q8_0").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model-q8_0.gguf\n") and "[INST] {{ if .System }}" in text
    assert (
        'PARAMETER stop "[INST]"' in text
        and "PARAMETER temperature 0\n" in text
        and "PARAMETER num_predict 6\n" in text
    )
    own = ollama.modelfile("m.gguf", "tokenizer", Generate(temperature=0.7))
    assert "TEMPLATE" not in own and "PARAMETER temperature 0.7\n" in own
