"""Our 4-bit products on a card against bitsandbytes' dequantised weights, at a 7B's shapes, GQA's and small models'.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_nf4_products.py
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

SHAPES = [
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008),  # Llama-2-7B
    (6144, 4096), (28672, 4096), (4096, 14336),  # Llama-3-8B, whose heads share keys and values
    (2048, 1536), (17920, 1536), (1536, 8960),  # Qwen2.5-1.5B
    (960, 576), (576, 576), (3072, 576), (576, 1536),  # SmolLM2-135M: 576 is no multiple of 128
    (4, 64), (1000, 192), (52, 64 * 33),  # ragged
]  # fmt: skip


def weights(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The words, the scales as the kernels read them, and what bitsandbytes makes of the same bytes, fp32."""
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    from fast_ft.models import nf4

    draw = torch.Generator("cuda").manual_seed(outputs)
    dense = torch.randn(outputs, inputs, generator=draw, device="cuda").to(dtype)
    packed, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float().view(-1)
    scales = nf4.pack_scales(absmax, dtype).view(outputs, inputs // 64).T.contiguous()
    words = packed.view(-1).view(torch.int32).view(outputs, inputs // 8)
    return words, scales, dequantize_4bit(packed, state).float()


def off(made: torch.Tensor, expected: torch.Tensor) -> float:
    """How far a product, or the sum of its parts, is from the expected one, by their norms."""
    whole = made.float().sum(dim=0) if made.dim() == 3 else made.float()
    return ((whole - expected).norm() / expected.norm()).item()


@pytest.fixture(params=["nf4_hopper", "nf4_mma"])
def way(request: pytest.FixtureRequest) -> Any:
    """A way whose kernel runs on this card."""
    found = importlib.import_module(f"fast_ft.generate.engine.{request.param}")
    if not found.CAPABILITY <= torch.cuda.get_device_capability() <= (found.NEWEST or (99, 0)):
        pytest.skip(f"{found.NAME} is not for this card")
    return found


def given_to(way: Any, x: torch.Tensor) -> torch.Tensor:
    """x in the order that a way wants."""
    from fast_ft.models import nf4

    return nf4.arranged(x, way.order_for(len(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_a_product_with_lora_says_what_bitsandbytes_weights_say(
    way: Any, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    if inputs % way.MULTIPLE:
        pytest.skip("left to the next way")
    words, scales, weight = weights(outputs, inputs, dtype)
    draw = torch.Generator("cuda").manual_seed(1)
    for rows in (1, 7, 8, 16, 31, 61, 64, 65, 100, 128):
        ranks = 16 * (rows % 3)
        x, xa = (torch.randn(rows, n, generator=draw, device="cuda").to(dtype) for n in (inputs, ranks))
        b = torch.randn(outputs, ranks, generator=draw, device="cuda").to(dtype)
        given: Any = (xa, b) if ranks else (None, None)
        expected = x.float() @ weight.T + (xa.float() @ b.float().T if ranks else 0)
        first = way.product(given_to(way, x), words, scales, *given)
        assert off(first, expected) < (0.001 if dtype == torch.float16 else 0.008), f"{rows} rows"
        assert (len(first) if first.dim() == 3 else 1) == way.parts_for(rows, outputs, inputs, x.device)
        for _ in range(3):
            assert torch.equal(first, way.product(given_to(way, x), words, scales, *given)), "not the same bytes"


def test_every_share_of_blocks_says_the_same(way: Any) -> None:
    """Tiles are cut anywhere, and each part is written by one block."""
    words, scales, weight = weights(1000, 640, torch.float16)
    x = torch.randn(20, 640, device="cuda", dtype=torch.float16)
    for blocks in range(1, 24):
        made = way.product(given_to(way, x), words, scales, None, None, blocks=blocks)
        assert off(made, x.float() @ weight.T) < 0.001, f"{blocks} blocks"


def test_the_cut_of_a_card_with_little_shared_memory_says_the_same() -> None:
    from fast_ft.generate.engine import nf4_mma

    words, scales, weight = weights(1000, 640, torch.float16)
    for rows in (3, 64, 128):
        cut = nf4_mma.fitting(rows, 99 << 10)
        assert cut.shared <= 99 << 10 < nf4_mma.fitting(rows, 227 << 10).shared
        x = torch.randn(rows, 640, device="cuda", dtype=torch.float16)
        assert off(nf4_mma.product(x, words, scales, None, None, cut, 5), x.float() @ weight.T) < 0.001


def test_a_captured_product_is_replayed_on_torchs_stream(way: Any) -> None:
    words, scales, weight = weights(4096, 1024, torch.float16)
    x = torch.randn(48, 1024, device="cuda", dtype=torch.float16)
    given = given_to(way, x).clone()
    way.product(given, words, scales, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = way.product(given, words, scales, None, None)
    x.copy_(torch.randn_like(x))
    given.copy_(given_to(way, x))
    graph.replay()
    assert off(made, x.float() @ weight.T) < 0.001
    assert torch.equal(made, way.product(given, words, scales, None, None))


def test_products_that_are_launched_early_wait_for_what_they_read(way: Any) -> None:
    """Each reads what the launch before it has written, and is launched while that one ends."""
    words, scales, weight = weights(1024, 1024, torch.float16)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    graph, made = torch.cuda.CUDAGraph(), []
    for captures in (False, True):  # the first time compiles
        made = [x]
        with torch.cuda.graph(graph) if captures else contextlib.nullcontext():
            for _ in range(20):
                y = way.product(given_to(way, made[-1]), words, scales, None, None)
                made.append((y.float().sum(dim=0) if y.dim() == 3 else y.float()).mul_(0.03).half())
    for _ in range(5):
        graph.replay()
        for before, after in itertools.pairwise(made):
            assert off(after / 0.03, before.float() @ weight.T) < 0.002


@pytest.mark.parametrize("outputs, inputs", [(12288, 4096), (4096, 11008), (1000, 192)])
def test_the_way_for_7_5_says_what_bitsandbytes_weights_say(outputs: int, inputs: int) -> None:
    from fast_ft.generate.engine import nf4_turing

    words, scales, weight = weights(outputs, inputs, torch.float16)
    for rows in (1, 16, 31, 64):
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        made = nf4_turing.product(x, words, scales)
        assert off(made, x.float() @ weight.T) < 0.001
        assert torch.equal(made, nf4_turing.product(x, words, scales))


def test_products_are_timed_beside_bitsandbytes() -> None:
    from fast_ft.generate.engine.product_times import time_products

    found = time_products([(1024, 512)], [1, 16], "float16", "cuda:0")
    assert {"bitsandbytes", "the CUDA kernel"} < {each["way"] for each in found}
    assert not [each for each in found if "failed" in each]
    assert all(each["us"] > 0 and each["off"] < 0.002 for each in found)


def test_a_kernel_runs_in_a_thread_that_has_used_no_card(way: Any) -> None:
    import threading

    words, scales, weight = weights(256, 128, torch.float16)
    x, found = torch.randn(8, 128, device="cuda", dtype=torch.float16), []
    thread = threading.Thread(target=lambda: found.append(way.product(given_to(way, x), words, scales, None, None)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert off(found[0], x.float() @ weight.T) < 0.001
