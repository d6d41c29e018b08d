"""The pool on a card: captured as uncaptured, the kernel as plain torch, the same answers twice.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_decode_captured.py
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bases import save_in_4_bits

pytestmark = pytest.mark.gpu

POCKET = Path(__file__).parents[2] / "fast_ft" / "pocket" / "base"


@pytest.fixture(scope="module")
def model() -> Any:
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    section = schema.Model(name_or_path=str(POCKET), dtype="float16")
    maker = choose.make_loader(section, schema.Lora(), seed=1, name="peft")
    return with_adapter(maker.for_training().model)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[1, *(draw.randrange(3, 2048) for _ in range(draw.randrange(2, 90)))] for _ in range(40)]


@pytest.fixture(scope="module")
def four_bits(wide: Path) -> Any:
    """A random model of NF4 weights, wide enough for the product's kernel."""
    return tuned(wide)


@pytest.fixture(scope="module")
def mixed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same, but for a block's MLP and one of three layers that share an input, which were left in 16 bits."""
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.v_proj"]
    return tuned(save_in_4_bits(tmp_path_factory.mktemp("models") / "mixed", wide, skipped))


def tuned(folder: Path) -> Any:
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    section = schema.Model(name_or_path=str(folder), dtype="float16", load_in_4bit=True)
    maker = choose.make_loader(section, schema.Lora(), seed=1, name="peft")
    return with_adapter(maker.for_training().model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "wide"
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def with_adapter(model: Any) -> Any:
    import torch

    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval().requires_grad_(False)


def run(model: Any, prompts: list[list[int]], *, hot: bool = False, fused: dict[str, Any] | None = None, **values: Any
) -> Any:  # fmt: skip
    """Return (answers, pool)."""
    from fast_ft.generate.engine import ops_torch
    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.kv_cache import KVCache
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler
    from fast_ft.generate.engine.sequence import Sequence

    fused = fused or {}
    parts = FusedModel(model, **fused)
    assert (parts.ops is ops_torch) == (fused.get("kernels") is False), "the Triton kernels do not work here"
    sampler = Sampler(hot, temperature=1.2, top_k=40, top_p=0.95)
    config = EngineConfig(slots=16, longest=200, end_ids=(2,), pad_id=0, **values)
    pool = LLMEngine(parts, KVCache(parts, 120, bits=fused.get("kv_bits", 16)), sampler, config)
    rows = [Sequence(prompt, 4 + index, key=index) for index, prompt in enumerate(prompts)]
    list(pool.run(rows))
    return [row.tokens for row in rows], pool


def test_captured_steps_are_the_uncaptured_ones(model: Any, prompts: list[list[int]]) -> None:
    for hot in (False, True):
        captured, pool = run(model, prompts, hot=hot)
        assert pool.runner.graphs.works and pool.runner.graphs.count >= 3, "nothing was captured"
        assert captured == run(model, prompts, hot=hot, captures=False)[0]


def test_steps_are_captured_while_the_card_computes(model: Any, prompts: list[list[int]]) -> None:
    """No step is run to warm up: each shape is captured behind a prompt's pass or a burst, and says the same."""
    made, pool = run(model, prompts[:10])
    assert pool.runner.graphs.works and pool.runner.graphs.count >= 2
    assert "captures" not in pool.watch.seconds(), "a shape was captured while the card waited"
    assert made == run(model, prompts[:10], captures=False)[0]


def test_the_same_answers_twice(model: Any, prompts: list[list[int]]) -> None:
    assert run(model, prompts, hot=True)[0] == run(model, prompts, hot=True)[0]


@pytest.mark.parametrize("fused", [{}, {"kernels": False}, {"workspace_mib": 1}, {"dequantise": True}], ids=str)
@pytest.mark.parametrize("which", ["model", "four_bits", "mixed"])
def test_the_model_says_the_same_teacher_forced(
    which: str, fused: dict[str, Any], prompts: list[list[int]], request: pytest.FixtureRequest
) -> None:
    from bench.agreement_decode import teacher_forced

    model = request.getfixturevalue(which)
    made, pool = run(model, prompts, fused=fused)
    assert pool.runner.graphs.works and pool.runner.graphs.count
    assert pool.runner.model.planes == ("kernels" not in fused and "dequantise" not in fused)
    found = teacher_forced(model, prompts, made)
    print(found)
    assert found["argmax_agrees"] >= 0.98


@pytest.mark.parametrize("hot", [False, True])
def test_an_8_bit_cache_answers_the_same_captured_and_twice(
    four_bits: Any, prompts: list[list[int]], hot: bool
) -> None:
    from bench.agreement_decode import teacher_forced

    made, pool = run(four_bits, prompts, hot=hot, fused={"kv_bits": 8})
    assert pool.runner.cache.scales is not None and pool.runner.draw is not None
    assert made == run(four_bits, prompts, hot=hot, fused={"kv_bits": 8})[0]
    assert made == run(four_bits, prompts, hot=hot, fused={"kv_bits": 8}, captures=False)[0]
    if not hot:
        assert teacher_forced(four_bits, prompts, made)["argmax_agrees"] >= 0.95


def test_few_rows_are_divided_and_say_the_same(four_bits: Any, prompts: list[list[int]]) -> None:
    """One row at a time has its attention divided among many programs; twice, the sums are the same to the bit."""
    alone, _ = run(four_bits, prompts[:2], hot=True)
    assert alone == run(four_bits, prompts[:2], hot=True)[0]


def test_candidates_and_captures_with_4_bit_weights(four_bits: Any, prompts: list[list[int]]) -> None:
    doubled = [prompt for prompt in prompts[:10] for _ in range(2)]
    captured, pool = run(four_bits, doubled, hot=True)
    assert pool.runner.model.planes and pool.runner.graphs.works
    assert captured == run(four_bits, doubled, hot=True, captures=False)[0]
    assert captured[0] != captured[1][: len(captured[0])]


def test_the_numbers_are_those_of_a_cpu() -> None:
    import torch

    from fast_ft.generate.engine.sampler import uniform

    key = torch.randint(0, 2**63 - 1, (10_000,))
    count = torch.arange(10_000)
    assert torch.equal(uniform(key, count), uniform(key.cuda(), count.cuda()).cpu())


def test_attention_over_pages_equals_plain_torch() -> None:
    import torch

    from fast_ft.generate.engine import ops_torch, ops_triton
    from fast_ft.generate.engine.block_manager import PAGE

    torch.manual_seed(0)
    for heads, kv_heads, dim, dtype in ((32, 32, 128, torch.float16), (8, 2, 64, torch.float32)):
        lengths = torch.tensor([0, 1, 15, 16, 31, 200, 511, 1000] * 3, device="cuda")
        k, v = (torch.randn(1600 * PAGE, kv_heads, dim, device="cuda").to(dtype) for _ in range(2))
        table = torch.randperm(1599, device="cuda")[: 24 * 64].view(24, 64) + 1
        q = torch.randn(24, heads + kv_heads, dim, device="cuda").to(dtype)[:, :heads]
        expected = ops_torch.paged_attention(q, k, v, table, lengths, columns=1024)
        for rows, splits in ((8, None), (24, None), (24, 1), (24, 32)):  # each has a kernel of its own
            made = ops_triton.paged_attention(q[:rows], k, v, table[:rows], lengths[:rows], splits=splits)
            torch.testing.assert_close(made, expected[:rows], atol=2e-3, rtol=2e-2)
