"""The 8-bit KV cache: what it rounds, and that answers from it are the model's, replayed, in any pool."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fast_ft.common.errors import InputError
from fast_ft.generate import parity
from fast_ft.generate.engine import attention_compare, kernel_checks, ops_torch
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache, dequantised, quantised, spreading
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.generate.engine.model_runner import EngineConfig
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.hub.families import ModelShape
from fast_ft.plan.decode_pool import Answers, DecodePlan, PoolMemory, has_tiles, kv_bytes, settle_pool
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.recipe import schema
from tests.generate.test_engine import HOT, kind_of, tuned
from tests.helpers.parts import POCKET

LLAMA = ModelShape.from_config(
    {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
     "vocab_size": 32000}
)  # fmt: skip
PROMPTS = [[1, *range(100 + 9 * n, 105 + 20 * n)] for n in range(7)]
BEGUN = [[*range(50, 78), *prompt[1:]] for prompt in PROMPTS]  #: which share a page and twelve tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return tuned(POCKET)


@pytest.fixture(scope="module")
def fused(model: Any) -> FusedModel:
    return FusedModel(model, kv_bits=8)


def answers(
    fused: FusedModel, sampler: Sampler, prompts: list[list[int]] = PROMPTS, *, slots: int = 4, pages: int = 60,
    **values: Any,
) -> list[list[int]]:  # fmt: skip
    config = EngineConfig(slots, **{"end_ids": (2,), "pad_id": 0, "longest": 300} | values)
    rows = [Sequence(prompt, 30 + index, key=index) for index, prompt in enumerate(prompts)]
    engine = LLMEngine(fused, KVCache(fused, pages, bits=8), sampler, config)
    list(engine.run(rows))
    assert len(engine.scheduler.prefix.prompt) == (28 if prompts is BEGUN else 0)
    return [row.tokens for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_moves_by_half_a_step_of_its_heads_range_at_most(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 3, 32, generator=draw) * torch.logspace(-4, 3, 50)[:, None, None] + 1).to(dtype)
    x[3] = 0.5  # a head without a range
    whole, scales = quantised(x)
    assert whole.dtype == torch.int8 and scales.shape == (2, 50, 3) and scales.dtype == dtype
    off = (dequantised(whole, scales, torch.float32) - x.float()).abs().amax(dim=-1)
    span = x.float().amax(dim=-1) - x.float().amin(dim=-1)
    rounding = torch.finfo(dtype).eps * x.float().abs().amax(dim=-1)
    assert (off <= 0.51 * span / 254 + rounding).all()
    assert (off > 0.2 * span / 254).float().mean() > 0.8, "it rounds"


@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_spreading_leaves_products_as_they_are(width: int) -> None:
    matrix = spreading(width, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(width), atol=1e-5, rtol=0)
    outlier = torch.zeros(width)
    outlier[3] = 8.0
    assert (outlier @ matrix).abs().max() <= 8.0 / (width & -width) ** 0.5 + 1e-5


@pytest.mark.parametrize("prompts", [PROMPTS, BEGUN], ids=["apart", "behind a shared prefix"])
def test_answers_follow_from_the_rows_alone(fused: FusedModel, prompts: list[list[int]]) -> None:
    """Whatever the slots, pages and passes: the model's dtype is fp32 here."""
    whole = answers(fused, HOT, prompts)
    assert answers(fused, HOT, prompts) == whole
    assert answers(fused, HOT, prompts, slots=7) == whole == answers(fused, HOT, prompts, slots=1)
    assert len({tuple(tokens[:4]) for tokens in whole}) > 4


@pytest.mark.parametrize("prompts", [PROMPTS, BEGUN], ids=["apart", "behind a shared prefix"])
def test_an_8_bit_pool_says_what_the_model_says(model: Any, fused: FusedModel, prompts: list[list[int]]) -> None:
    greedy = Sampler(False)
    worst = 0
    for setting in ({}, {"prefill_tokens": 40}, {"pages": 14}):
        for prompt, tokens in zip(prompts, answers(fused, greedy, prompts, **setting), strict=True):
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
            lost = logits_TV.max(dim=-1).values - logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            worst = max(worst, lost.max().item())
    assert worst < 0.2, "logits: what is chosen is the likeliest token, or nearly as likely"


def test_cells_are_copied_with_their_scales(fused: FusedModel) -> None:
    cache = KVCache(fused, 3, bits=8)
    assert cache.scales is not None
    cache.keys.random_(-127, 127)
    cache.values.random_(-127, 127)
    cache.scales.uniform_(0.1, 1)
    source, target = torch.arange(PAGE, 2 * PAGE), torch.arange(3 * PAGE, 4 * PAGE)
    cache.copy(source, target)
    for index in range(len(fused.layers)):
        for one, other in zip(cache.read(index, source), cache.read(index, target), strict=True):
            assert torch.equal(one, other) and one.dtype == fused.dtype


def test_kernels_for_8_bits_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "_passed", set())
    kernel_checks.attention(kind_of(kv_bits=8), ops_torch)

    def blind(*given: Any, scales: Any = None, **named: Any) -> Any:
        return ops_torch.paged_attention(*given, scales=None if scales is None else scales.flip(0), **named)

    kernel_checks.attention(kind_of(), SimpleNamespace(**vars(ops_torch) | {"paged_attention": blind}))
    with pytest.raises(RuntimeError, match="differ from plain torch by"):
        kernel_checks.attention(kind_of(kv_bits=8, head_dim=16), SimpleNamespace(
            **vars(ops_torch) | {"paged_attention": blind}))  # fmt: skip


@pytest.mark.parametrize("bits", [8, 16])
def test_compared_attention_lies_within_the_values(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not while the scales of keys and values were mixed up: its rounding alone was over what is allowed."""
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        attention_compare, "refuse_difference", lambda kind, what, expected, found: seen.append(expected)
    )
    values = attention_compare._Cells(kind_of(kv_bits=16))._held[1].abs().max()
    attention_compare.attention(kind_of(kv_bits=bits), ops_torch)["attention over pages, parts a head: 1"]()
    (mixed,) = seen
    assert len(mixed) == 2 and all(0.5 < each.abs().max() <= 1.01 * values for each in mixed)


# The plan


def test_a_pool_of_8_bits_holds_nearly_twice_the_tokens() -> None:
    assert kv_bytes(LLAMA, "16bit") == LLAMA.kv_bytes == 2**19
    assert kv_bytes(LLAMA, "8bit") == 2**18 + 32 * 32 * 2 * 2 * 2, "a scale and a middle for each token and head"
    memory = PoolMemory(4.3, 14.0, load_in_4bit=True)
    wide, narrow = (
        settle_pool(LLAMA, Answers([200] * 150, 1024, kv_cache=kind), None, memory) for kind in ("16bit", "8bit")
    )
    assert (wide.kv_cache, narrow.kv_cache) == ("16bit", "8bit") and narrow.gib <= 14.0
    assert wide.cache_tokens is not None and narrow.cache_tokens is not None
    assert narrow.slots > wide.slots and 1.8 < narrow.cache_tokens / wide.cache_tokens < 2
    general = settle_pool(LLAMA, Answers([200] * 150, 1024, pooled=False, kv_cache="8bit"), 4, memory)
    assert general.kv_cache == "16bit", "transformers' generate keeps its own cache"


def test_plan_json_says_the_kind_of_cache_and_the_recipe_may_change_it() -> None:
    made = RunPlan(TrainPlan(8), DecodePlan(20, 3200, kv_cache="8bit"))
    content = json.loads(json.dumps(made.to_json()))
    assert content["kv_cache"] == "8bit" and RunPlan.from_json(content, Path("plan.json")) == made
    assert RunPlan.from_json({k: v for k, v in content.items() if k != "kv_cache"}, Path("p")).decode.kv_cache == (
        "16bit"
    ), "an earlier version's plan"
    with pytest.raises(InputError, match="4bit"):
        RunPlan.from_json(content | {"kv_cache": "4bit"}, Path("plan.json"))
    assert made.decode.given(schema.Generate(kv_cache="8bit")) == made.decode
    changed = made.decode.given(schema.Generate(batch_size=5))
    assert (changed.slots, changed.cache_tokens, changed.kv_cache) == (5, 1600, "16bit"), "the same memory"


def test_the_check_against_the_model_allows_for_8_bits() -> None:
    assert parity.allowed("float16", "16bit") == 0.02
    assert 0.02 < parity.allowed("float32", "8bit") < 0.06, "a wrong mask shows as a tenth of a nat"


def test_prompts_that_begin_alike_leave_room_for_more_slots() -> None:
    """28 shared tokens are a whole page that no slot holds for itself; 12 more are copied to each."""
    prompts, gib = [133] * 150, LLAMA.weights_gib(load_in_4bit=True) + 0.75

    def slots(shared: int, capability: tuple[int, int]) -> int:
        memory = PoolMemory(gib, 14.7, load_in_4bit=True, tiles=has_tiles(capability))
        return settle_pool(LLAMA, Answers(prompts, 1024, shared_tokens=shared), None, memory).slots

    newer = {shared: slots(shared, (8, 0)) for shared in (0, 15, 16, 28, 100)}
    assert newer[0] == newer[15] < newer[16] == newer[28] < newer[100]
    assert newer[28] / newer[0] == pytest.approx((133 + 128 + 8) / (133 - 16 + 128 + 8), abs=0.02)
    assert 64 < newer[28] < 112 and slots(28, (7, 5)) == 64, "65 slots take as long as 110 on a T4"


@pytest.mark.parametrize("shared", [500, 2000])
def test_a_planned_pool_has_room_for_the_shared_tokens_too(shared: int) -> None:
    """Once, beside the usual tokens of all slots."""
    own, answered = 105, 128 + PAGE // 2
    memory = PoolMemory(LLAMA.weights_gib(load_in_4bit=True) + 0.75, 14.7, load_in_4bit=True, tiles=False)
    made = settle_pool(LLAMA, Answers([shared + own] * 150, 1024, shared_tokens=shared), None, memory)
    assert made.cache_tokens is not None
    taken = -(-shared // PAGE) * PAGE + made.slots * (own + shared % PAGE + answered)
    assert taken <= made.cache_tokens < taken + 2 * (own + shared % PAGE + answered)
