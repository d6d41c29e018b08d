"""FamilySpec: what config.json says, what our own blocks take, what goes the general way, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.hub.families import OWN, FamilySpec, end_token_ids
from tests.helpers import bases

SIZES = bases.SIZES
LLAMA = SIZES | {"model_type": "llama"}


@pytest.mark.parametrize("kind", OWN)
def test_what_a_short_config_leaves_out_is_what_transformers_takes(kind: str) -> None:
    """A config.json may name only what differs from its family's defaults."""
    import transformers

    short = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    short |= {"num_attention_heads": 32, "hidden_size": 512}
    for more in ({}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 1}):
        if more and kind in ("llama", "mistral"):
            continue
        whole = transformers.AutoConfig.for_model(kind, **short, **more).to_dict()
        said, meant = FamilySpec.from_config(short | more | {"model_type": kind}), FamilySpec.from_config(whole)
        assert said == meant
        assert meant.general is None, "what transformers writes by itself is known"
    sliding = FamilySpec.from_config(short | {"model_type": kind}).windows
    assert sliding == ((4096, 4096) if kind == "mistral" else (None, None))


@pytest.mark.parametrize("name", bases.ALL)
def test_families_and_their_ways(name: str) -> None:
    import transformers

    kind, own = bases.ALL[name]
    spec = FamilySpec.from_config(transformers.AutoConfig.for_model(kind, **SIZES | own).to_dict())
    assert (spec.general is None) == (name in bases.OWN)
    assert (spec.way or "").startswith("general way: ") == (name in bases.GENERAL)
    expected = {"mistral": (12, 12), "qwen2 window": (None, 12), "qwen3 window": (None, 12)}.get(name, (None, None))
    assert spec.windows == expected
    assert spec.qk_norms == name.startswith("qwen3")
    assert spec.softcap == (name == "gemma2")
    assert spec.alone_beyond == {"phi3 long": 48, "dynamic rope": 0}.get(name)
    assert spec.window_below(13) == (12 if expected[1] else None)
    assert spec.window_below(12) is None, "a row as long as the window does not notice it"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"a_key_of_next_year": True}, "a_key_of_next_year"),
        ({"partial_rotary_factor": 0.5}, "of a part of each head"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "different in each kind"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_our_blocks_do_not_know_goes_the_general_way(change: dict[str, Any], said: str) -> None:
    assert FamilySpec.from_config(LLAMA).general is None
    assert said in (FamilySpec.from_config(LLAMA | change).general or "")


def test_keys_that_change_nothing_are_let_pass() -> None:
    for change in (
        {"hidden_act": "swish"}, {"a_key_of_next_year": None}, {"embd_pdrop": 0.0}, {"_flash_attn_2_enabled": True},
        {"use_cache": False}, {"pretraining_tp": 2}, {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ):  # fmt: skip
        assert FamilySpec.from_config(LLAMA | change).general is None, change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"text_config": {"hidden_size": 8}}, "for pictures"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "experts"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no head that predicts tokens"),
        ({"hidden_size": "64"}, "has no hidden_size"),
        ({"max_position_embeddings": "256"}, "max_position_embeddings 256"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps small"),
        ({"rope_parameters": [1]}, "rope that is no object"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window -1"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": [[], {}]}, "layer_types"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "one"}, "max_window_layers one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_neither_way_takes_is_refused_in_a_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FamilySpec.from_config(LLAMA | change)


def test_end_ids_are_generation_configs_before_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert end_token_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert end_token_ids(tmp_path) == [7, 2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert end_token_ids(tmp_path) == [2]
