"""The plan: known sizes of a 7B, and choices that follow the memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import POCKET

from fast_ft.errors import InputError
from fast_ft.plan import GIB, ModelShape, Plan, activations_gib, lora_gib, settle, weights_gib

CONFIG_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = ModelShape.from_config(CONFIG_7B)


def plan(memory_gib: float | None, **values: Any) -> Plan:
    """The plan for 100 rows of up to 700 tokens and 150 prompts of up to 470, on a 7B."""
    arguments: dict[str, Any] = {
        "effective_batch_size": 8, "wanted_micro_batch": None, "wanted_generation_batch": None,
        "max_new_tokens": 1024, "r": 16, "optim": "adamw_8bit", "load_in_4bit": True,
        "wanted_checkpointing": True, "fused_kernels": True, "tflops": None,
    }  # fmt: skip
    return settle(LLAMA, [200, 700, 350], [41, 470] * 75, memory_gib=memory_gib, **arguments | values)


def test_a_7bs_known_sizes() -> None:
    embeddings = 2 * 32000 * 4096 * 2 / GIB
    assert weights_gib(LLAMA, load_in_4bit=True) - embeddings == pytest.approx(3.1, abs=0.05)
    assert embeddings == pytest.approx(0.5, abs=0.02)
    assert weights_gib(LLAMA, load_in_4bit=False) == pytest.approx(12.55, abs=0.01)  # 6,738,149,376 weights less norms
    assert LLAMA.kv_bytes == 0.5 * 2**20
    assert lora_gib(LLAMA, 16, "adamw_torch") * GIB == 39_976_960 * 16
    assert lora_gib(LLAMA, 16, "adamw_8bit") * GIB == 39_976_960 * 10

    def mib_a_token(*, checkpointing: bool) -> float:
        few, many = (
            activations_gib(LLAMA, tokens, checkpointing=checkpointing, fused_kernels=True) for tokens in (1024, 2048)
        )
        return many - few  # of 1,024 tokens in GiB, which is MiB a token

    # 0.25 for the layers' inputs, and what one layer keeps while it is computed again
    assert mib_a_token(checkpointing=True) == pytest.approx(0.37, abs=0.03)
    assert mib_a_token(checkpointing=False) == pytest.approx(3.83, abs=0.1)  # measured, H200, Unsloth 2026.10.7


def test_shapes_without_the_optional_keys_and_with_grouped_heads() -> None:
    short = {k: v for k, v in CONFIG_7B.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    assert ModelShape.from_config(short) == LLAMA
    grouped = ModelShape.from_config(CONFIG_7B | {"num_key_value_heads": 8, "tie_word_embeddings": True})
    assert grouped.kv_bytes == LLAMA.kv_bytes // 4 and grouped.tied
    assert grouped.linear_shapes[1] == (4096, 1024)
    assert ModelShape.from_config(CONFIG_7B | {"head_dim": 64}).linear_shapes[0] == (4096, 2048)


def test_the_pocket_bases_own_weights_are_counted_right() -> None:
    shape = ModelShape.from_config(json.loads((POCKET / "config.json").read_text()))
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size * 2
    file = (POCKET / "model.safetensors").stat().st_size
    assert weights_gib(shape, load_in_4bit=False) * GIB + norms == pytest.approx(file, rel=0.002)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"'gpt2'.* no hidden_size, intermediate_size"):
        ModelShape.from_config({"model_type": "gpt2", "n_embd": 768, "vocab_size": 50257})


def test_more_memory_never_means_less_work_at_once() -> None:
    plans = [plan(gib) for gib in (4, 5, 6, 8, 11, 14.7, 24, 80, 141)]
    for name in ("most_tokens", "generation_batch", "train_gib", "generate_gib"):
        values = [getattr(each, name) for each in plans]
        assert values == sorted(values), name
    assert plans[0].most_tokens == 64 and plans[0].generation_batch == 1, "the run will say that it does not fit"
    assert plans[-1].most_tokens == 8 * 704 and plans[-1].generation_batch == 150
    assert plans[0].generation_batch < plans[5].generation_batch < plans[-1].generation_batch


def test_a_plan_stays_within_its_memory() -> None:
    for gib in (6.0, 8.0, 11.0, 14.7, 24.0):
        made = plan(gib)
        assert made.memory_gib == gib
        assert made.train_gib < 0.93 * gib
        assert made.generation_batch == 1 or made.generate_gib < 0.93 * gib


def test_what_the_recipe_fixes_stays() -> None:
    for gib in (None, 5.0, 80.0):
        made = plan(gib, wanted_micro_batch=3, wanted_generation_batch=7)
        assert (made.micro_batch, made.generation_batch) == (3, 7)


def test_thriftier_settings_leave_room_for_more_rows() -> None:
    assert (
        plan(24, wanted_micro_batch=4).train_gib < plan(24, wanted_checkpointing=False, wanted_micro_batch=4).train_gib
    )
    dear = {"wanted_micro_batch": 4}
    assert plan(24, **dear).train_gib < plan(24, fused_kernels=False, **dear).train_gib
    assert plan(24, **dear).train_gib < plan(24, optim="adamw_torch", **dear).train_gib < 24
    assert plan(24, **dear).train_gib < plan(24, load_in_4bit=False, **dear).train_gib
    assert plan(8, max_new_tokens=128).generation_batch > plan(8).generation_batch


def test_a_cpu_predicts_nothing_and_never_exceeds_what_there_is_to_do() -> None:
    made = plan(None)
    assert made == Plan(8, checkpointing=True, generation_batch=64)
    assert not plan(None, wanted_checkpointing=None).checkpointing
    few = settle(
        LLAMA, [10], [], effective_batch_size=8, wanted_micro_batch=None, wanted_generation_batch=None,
        max_new_tokens=9, r=1, optim="adamw_torch", load_in_4bit=True, wanted_checkpointing=True,
        fused_kernels=False, memory_gib=None, tflops=None,
    )  # fmt: skip
    assert few.generation_batch == 1
    assert Plan(**json.loads(json.dumps(made.to_json()))) == made


def test_activations_are_kept_where_the_longest_row_fits() -> None:
    assert plan(6.5, wanted_checkpointing=None).checkpointing
    kept = plan(14.3, wanted_checkpointing=None)
    assert not kept.checkpointing and 2000 < kept.most_tokens < 2700
    assert plan(7.2, wanted_checkpointing=None).train_gib < 7.2


def test_a_pass_is_captured_where_launches_would_take_longer_than_arithmetic() -> None:
    h200 = plan(14.3, wanted_checkpointing=None, tflops=743.0)
    assert h200.capture and h200.micro_batch in (2, 3) and h200.most_tokens is None
    assert plan(140, wanted_checkpointing=None, tflops=743.0).micro_batch == 4
    assert not plan(14.3, wanted_checkpointing=None, tflops=25.0).capture, "a T4 waits for arithmetic"
    assert not plan(14.3, wanted_checkpointing=True, tflops=743.0).capture, "nothing is recomputed in a graph"
