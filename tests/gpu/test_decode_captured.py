"""The pool on a card: captured as uncaptured, the kernel as plain torch, the same answers twice.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_decode_captured.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

POCKET = Path(__file__).parents[2] / "fast_ft" / "pocket" / "base"


@pytest.fixture(scope="module")
def model() -> Any:
    import torch

    from fast_ft import backend, recipe

    section = recipe.Model(name_or_path=str(POCKET), dtype="float16")
    maker = backend.make_backend(section, recipe.Lora(), seed=1, gradient_checkpointing=False, name="peft")
    model = maker.for_training().model.eval().requires_grad_(False)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[1, *(draw.randrange(3, 2048) for _ in range(draw.randrange(2, 90)))] for _ in range(40)]


def run(model: Any, prompts: list[list[int]], *, hot: bool = False, kernel: bool = True, **values: Any) -> Any:
    """Return (answers, pool)."""
    from fast_ft.decode.cache import Cache
    from fast_ft.decode.decode import Pool
    from fast_ft.decode.fused import Fused
    from fast_ft.decode.prefill import Row
    from fast_ft.decode.sampling import Sampler

    fused = Fused(model, dequantise=values.pop("dequantise", False), workspace_mib=values.pop("workspace_mib", 96))
    cache = Cache(len(fused.layers), fused.kv_heads, fused.head_dim, 120, fused.dtype, fused.device)
    assert cache.kernel is not None, "the Triton kernel does not work here"
    if not kernel:
        cache.kernel = None
    sampler = Sampler(hot, temperature=1.2, top_k=40, top_p=0.95)
    pool = Pool(fused, cache, sampler, slots=16, eos_id=2, pad_id=0, longest=200, **values)
    rows = [Row(prompt, 4 + index, key=index) for index, prompt in enumerate(prompts)]
    list(pool.run(rows))
    return [row.tokens for row in rows], pool


def test_captured_steps_are_the_uncaptured_ones(model: Any, prompts: list[list[int]]) -> None:
    for hot in (False, True):
        captured, pool = run(model, prompts, hot=hot)
        assert pool.captures and len(pool._graphs) >= 3, "nothing was captured"
        assert captured == run(model, prompts, hot=hot, captures=False)[0]


def test_the_same_answers_twice(model: Any, prompts: list[list[int]]) -> None:
    assert run(model, prompts, hot=True)[0] == run(model, prompts, hot=True)[0]


@pytest.mark.parametrize("values", [{}, {"kernel": False}, {"dequantise": True}, {"workspace_mib": 1}], ids=str)
def test_the_model_says_the_same_teacher_forced(model: Any, prompts: list[list[int]], values: dict[str, Any]) -> None:
    from bench.agreement_decode import teacher_forced

    made, pool = run(model, prompts, **values)
    assert pool.captures
    found = teacher_forced(model, prompts, made)
    print(found)
    assert found["argmax_agrees"] >= 0.98


def test_the_numbers_are_those_of_a_cpu() -> None:
    import torch

    from fast_ft.decode.sampling import uniform

    key = torch.randint(0, 2**63 - 1, (10_000,))
    count = torch.arange(10_000)
    assert torch.equal(uniform(key, count), uniform(key.cuda(), count.cuda()).cpu())


def test_the_kernel_equals_plain_torch() -> None:
    import torch

    from fast_ft.decode.cache import PAGE, gathered
    from fast_ft.decode.kernels import paged_attention

    torch.manual_seed(0)
    for heads, kv_heads, dim, dtype in ((32, 32, 128, torch.float16), (8, 2, 64, torch.float32)):
        lengths = torch.tensor([0, 1, 15, 16, 31, 200, 511, 1000], device="cuda")
        k, v = (torch.randn(600 * PAGE, kv_heads, dim, device="cuda").to(dtype) for _ in range(2))
        table = torch.randperm(599, device="cuda")[: 8 * 64].view(8, 64) + 1
        q = torch.randn(8, heads + kv_heads, dim, device="cuda").to(dtype)[:, :heads]
        made = paged_attention(q, k, v, table, lengths, page=PAGE)
        torch.testing.assert_close(made, gathered(q, k, v, table, lengths, 1024), atol=2e-3, rtol=2e-2)
