"""The plan: known sizes of a 7B, and choices that follow the memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data.prepare import prepare
from fast_ft.hub.families import GIB, FamilySpec, ModelShape
from fast_ft.plan import cards, memory_model, planner
from fast_ft.plan.cost_model import pass_seconds
from fast_ft.plan.decode_pool import Answers, DecodePlan, kv_bytes, settle_decoding
from fast_ft.plan.memory_model import fixed_gib, pass_gib
from fast_ft.plan.plans import Machine, Wanted, settle, shares_of, widths_of
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.plan.training_work import Rates, Training
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import POCKET, RecipeFactory

CONFIG_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = ModelShape.from_config(CONFIG_7B)


TRAINING = Training(16, "adamw_8bit", load_in_4bit=True, backend="fused", rows=8, longest=700)
STEPS = [[200, 700, 350, 420, 260, 310, 500, 330], [150, 640, 330, 280, 220, 410, 390, 300]] * 30
T4, H200 = cards.card("t4").expected, cards.card("h200").expected


def plans(memory_gib: float | None, rates: Rates = T4, **values: Any) -> RunPlan:
    """The plans for rows of up to 700 tokens and 150 prompts of up to 470, on a 7B."""
    answers = Answers([41, 470] * 75, values.pop("max_new_tokens", 1024))
    wanted = Wanted(**{key: values.pop(key) for key in list(values) if key in Wanted.__annotations__})
    world_size = values.pop("world_size", 1)
    training = replace(TRAINING, **values)
    return settle(LLAMA, training, STEPS, answers, wanted, Machine(memory_gib, rates, world_size))


def plan(memory_gib: float | None, rates: Rates = T4, **values: Any) -> TrainPlan:
    return plans(memory_gib, rates, **values).train


def pool(memory_gib: float | None, rates: Rates = T4, **values: Any) -> DecodePlan:
    return plans(memory_gib, rates, **values).decode


def test_a_7bs_known_sizes() -> None:
    embeddings = 2 * 32000 * 4096 * 2 / GIB
    assert LLAMA.weights_gib(load_in_4bit=True) - embeddings == pytest.approx(3.1, abs=0.05)
    assert embeddings == pytest.approx(0.5, abs=0.02)
    assert LLAMA.weights_gib(load_in_4bit=False) == pytest.approx(12.55, abs=0.01)  # 6,738,149,376 weights less norms
    assert LLAMA.kv_bytes == 0.5 * 2**20
    assert LLAMA.lora_weights(16) == 39_976_960
    more = fixed_gib(LLAMA, TRAINING) - fixed_gib(LLAMA, replace(TRAINING, r=8))
    # weights, gradients, two states of a byte with a scale for 256 of them, and copies in 16 bits, with zeros between
    zeros = 2 * 8 * 32 * (2 * 3 * 4096 + 2 * 11008)
    assert more * GIB == pytest.approx(39_976_960 / 2 * (4 + 4 + 2 * (1 + 4 / 256) + 2) + zeros)

    def mib_a_token(again: int) -> float:
        few, many = (pass_gib(LLAMA, TRAINING, tokens, again) for tokens in (1024, 2048))
        return many - few  # of 1,024 tokens in GiB, which is MiB a token

    # by count: 2.85 that layers keep, 0.01 of attention's sums, and at the peak in the last norm or layer
    assert mib_a_token(0) == pytest.approx(2.9, abs=0.05)
    unsloth = replace(TRAINING, backend="unsloth")
    more = pass_gib(LLAMA, unsloth, 2048, 0) - pass_gib(LLAMA, unsloth, 1024, 0)
    assert more == pytest.approx(3.75, abs=0.1)  # measured, H200, Unsloth 2026.10.7: 3.73
    # by count: 0.25 for the layers' inputs, 0.09 that one layer keeps while it is computed again, 0.06 of gradients
    assert mib_a_token(32) == pytest.approx(0.4, abs=0.05)
    assert mib_a_token(32) < mib_a_token(16) < mib_a_token(0)


def test_a_base_in_32_bits_takes_twice_as_much() -> None:
    """Its cache was planned for half of what it takes, and slots went down by eighths until it fitted."""
    wide = replace(LLAMA, number_bytes=4)
    assert wide.kv_bytes == 2 * LLAMA.kv_bytes
    assert wide.weights_gib(load_in_4bit=False) == 2 * LLAMA.weights_gib(load_in_4bit=False)
    embeddings = 2 * 32000 * 4096 * 2 / GIB
    four_bits = LLAMA.weights_gib(load_in_4bit=True)
    assert wide.weights_gib(load_in_4bit=True) == pytest.approx(four_bits + embeddings), "codes stay codes"
    assert kv_bytes(wide, "8bit") == 2**18 + 32 * 32 * 2 * 2 * 4, "scale and middle are in 32 bits"
    assert pass_gib(wide, TRAINING, 1024, 0) > 1.5 * pass_gib(LLAMA, TRAINING, 1024, 0)
    answers = Answers([120] * 100, 1024)

    def settled(shape: ModelShape, gib: float, *, load_in_4bit: bool = True) -> DecodePlan:
        return settle_decoding(shape, answers, None, memory_gib=gib, load_in_4bit=load_in_4bit, tiles=False)

    half, whole = settled(LLAMA, 14.7), settled(wide, 14.7)
    assert half.cache_tokens is not None and whole.cache_tokens is not None
    held = whole.cache_tokens * wide.kv_bytes / GIB + wide.weights_gib(load_in_4bit=True)
    assert held < whole.gib <= 0.96 * 14.7 and whole.cache_tokens < 0.5 * half.cache_tokens
    assert settled(LLAMA, 80.0).dequantise and not settled(wide, 80.0).dequantise, "25 GiB of weights, twice the cache"
    assert settled(wide, 80.0, load_in_4bit=False).gib > 25


@pytest.mark.parametrize(("dtype", "number_bytes"), [("auto", 2), ("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_the_recipes_dtype_is_what_is_planned_for(dtype: str, number_bytes: int, recipe_file: RecipeFactory) -> None:
    recipe = load_recipe(recipe_file(), [f"model.dtype={dtype}"])
    assert planner.as_loaded(recipe, planner.base_family(recipe)).shape.number_bytes == number_bytes
    card = cards.card("t4")
    made = planner.settle(recipe, prepare(recipe), planner.base_family(recipe), backend="peft", card=card)
    first = planner.settle(load_recipe(recipe_file()), prepare(recipe), planner.base_family(recipe), backend="peft",
                           card=card)  # fmt: skip
    assert made.decode is not None and first.decode is not None
    assert (made.decode.gib > first.decode.gib) == (made.train.train_gib > first.train.train_gib) == (number_bytes == 4)


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
    assert shape.weights_gib(load_in_4bit=False) * GIB + norms == pytest.approx(file, rel=0.002)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"'gpt2'.* no hidden_size, intermediate_size"):
        ModelShape.from_config({"model_type": "gpt2", "n_embd": 768, "vocab_size": 50257})
    assert "'gemma2'" in (FamilySpec.from_config(CONFIG_7B | {"model_type": "gemma2"}).general or "")


def test_more_memory_never_means_less_work_at_once() -> None:
    both = [plans(gib) for gib in (5.8, 6, 8, 11, 14.7, 24, 80, 141)]
    for name in ("slots", "gib"):
        values = [getattr(each.decode, name) for each in both]
        assert values == sorted(values), name
    made = [each.train for each in both]
    speeds = [each.step_seconds for each in made]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > 1.2 * speeds[-1]
    assert made[0].recompute_layers == 31
    assert both[-1].decode.slots == 150 and made[-1].recompute_layers == 0
    assert len(widths_of(made[-1], STEPS[0])) == 1, "a step in one pass"


def test_where_nothing_fits_the_thriftiest_is_tried() -> None:
    made = plan(4)
    # the last layer's backward pass comes first, so that it holds as much where it is computed again
    assert made.recompute_layers == 31 and made.most_tokens == 700 and made.train_gib > 4
    assert pool(4).slots == 1, "the run will say that it does not fit"


def test_a_plan_stays_within_its_memory() -> None:
    for gib in (6.2, 6.6, 7.2, 8.0, 11.0, 14.7, 24.0):
        made = plan(gib)
        assert made.memory_gib == gib
        assert made.train_gib <= 0.98 * gib
        assert pool(gib).slots == 1 or pool(gib).gib < 0.97 * gib


def test_the_largest_pass_that_fits_is_found_in_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 130,000 tokens was looked at in steps of eight tokens, once for each choice."""
    looked: list[int] = []
    taken = memory_model.pass_gib

    def counted(shape: ModelShape, training: Training, tokens: int, *given: Any, **named: Any) -> float:
        looked.append(tokens)
        return taken(shape, training, tokens, *given, **named)

    monkeypatch.setattr(memory_model, "pass_gib", counted)
    many = replace(TRAINING, rows=128, longest=2048)
    answers, wanted = Answers([41], 64), Wanted(capture=False)
    made = settle(LLAMA, many, [[1024] * 128], answers, wanted, Machine(80.0, H200)).train
    assert len(looked) < 33 * 20
    assert made.most_tokens is not None and 2048 < made.most_tokens < 128 * 1024
    gib = [
        fixed_gib(LLAMA, many) + taken(LLAMA, many, made.most_tokens + more, made.recompute_layers) for more in (0, 8)
    ]
    assert gib[0] <= 0.98 * 80 < gib[1], "eight tokens more would not fit"


def test_what_the_recipe_fixes_stays() -> None:
    for gib in (None, 5.0, 80.0):
        made = plans(gib, micro_batch=3, generation_batch=7)
        assert (made.train.micro_batch, made.decode.slots) == (3, 7)
        assert plan(gib, recompute=True).recompute_layers == 32
        assert plan(gib, recompute=False).recompute_layers == 0
    assert not plan(14.7, H200, capture=False).capture


def test_thriftier_settings_take_less_memory() -> None:
    one = {"micro_batch": 4, "recompute": False}
    usual = plan(80, **one).train_gib
    assert plan(80, micro_batch=4, recompute=True).train_gib < usual
    assert usual < plan(80, backend="unsloth", **one).train_gib
    assert usual < plan(80, optim="adamw_torch", **one).train_gib
    assert usual < plan(80, load_in_4bit=False, **one).train_gib
    assert pool(8, max_new_tokens=64).slots > pool(8).slots


def test_two_processes_share_each_step_and_take_half_its_time() -> None:
    alone, both = plan(14.7), plan(14.7, world_size=2)
    assert both.world_size == 2 and pool(14.7, world_size=2) == pool(14.7)
    assert alone.step_seconds / 2 < both.step_seconds < 0.56 * alone.step_seconds, "shares are not quite equal"
    assert both.train_gib <= 14.7 and both.most_tokens is not None
    for step in STEPS[:2]:
        shares = shares_of(both, step)
        assert sorted(n for each in shares for n in each) == sorted(step)
        assert abs(sum(shares[0]) - sum(shares[1])) < 0.1 * sum(step)
        assert all(sum(widths_of(both, each)) >= sum(each) for each in shares)
    few = shares_of(replace(both, world_size=16), STEPS[0])
    assert sum(map(len, few)) == 8 and few.count([]) == 8, "more processes than rows: some have nothing to do"
    assert widths_of(both, []) == []


def test_a_cpu_predicts_nothing_and_never_exceeds_what_there_is_to_do() -> None:
    made = plans(None)
    assert made == RunPlan(TrainPlan(8, backend="fused"), DecodePlan(64))
    few = settle(LLAMA, TRAINING, STEPS, Answers([], 9), Wanted(), Machine())
    assert few.decode is None, "no prompts are planned for"
    assert RunPlan.from_json(json.loads(json.dumps(made.to_json())), Path("plan.json")) == made


def test_no_more_layers_are_computed_again_than_must_be() -> None:
    counts = [plan(gib).recompute_layers for gib in (6, 6.5, 7, 24)]
    assert 32 > counts[0] > counts[1] > counts[2] > 0 == counts[3]


def test_a_pass_is_captured_where_launches_would_take_longer_than_arithmetic() -> None:
    assert plan(9, H200, recompute=False).capture
    assert plan(8, H200).capture, "with layers that are computed again, too"
    assert not plan(14.3, T4).capture, "a T4 waits for arithmetic"
    assert not plan(7.2, H200, draws=True).capture, "dropout cannot draw the same again in a graph"
    assert plan(9, H200, draws=True, recompute=False).capture


def test_recomputation_costs_half_as_much_again() -> None:
    kept, again = (pass_seconds(LLAMA, TRAINING, T4, 2048, count, row=480, capture=False).card for count in (0, 32))
    assert 1.3 < again / kept < 1.5


def test_a_t4_waits_for_arithmetic_and_an_h200_for_launches() -> None:
    def seconds(rates: Rates, *, capture: bool) -> float:
        made = pass_seconds(LLAMA, TRAINING, rates, 1408, 0, row=480, capture=capture)
        return max(made.card, made.host)

    assert seconds(T4, capture=False) == seconds(T4, capture=True) > 5 * seconds(H200, capture=False)
    assert seconds(H200, capture=True) < 0.8 * seconds(H200, capture=False)
