"""The draw: transformers' processors in its order, the right frequencies, and the same numbers on every device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from fast_ft.generate.engine import sampler as sampling
from fast_ft.generate.engine.sampler import Sampler, uniform

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.3},
]


def exact(logits_SV: torch.Tensor, seen: list[int], values: dict[str, Any]) -> torch.Tensor:
    """The distribution by transformers' own processors, in the order in which its generate applies them."""
    processors = transformers.LogitsProcessorList()
    if (penalty := values.get("repetition_penalty", 1.0)) != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(transformers.TemperatureLogitsWarper(float(values.get("temperature", 1.0))))
    if values.get("top_k"):
        processors.append(transformers.TopKLogitsWarper(values["top_k"]))
    if values.get("top_p", 1.0) < 1.0:
        processors.append(transformers.TopPLogitsWarper(values["top_p"]))
    if values.get("min_p"):
        processors.append(transformers.MinPLogitsWarper(values["min_p"]))
    ids = torch.tensor([seen] * len(logits_SV), dtype=torch.int64)
    return processors(ids, logits_SV.clone()).softmax(dim=-1)


def marks(seen: list[int], rows: int, vocabulary: int) -> torch.Tensor:
    mask = torch.zeros(rows, vocabulary, dtype=torch.bool)
    mask[:, seen] = True
    return mask


def in_place(weight_SK: torch.Tensor, token_SK: torch.Tensor, vocabulary: int) -> torch.Tensor:
    share = weight_SK / weight_SK.sum(dim=-1, keepdim=True)
    return torch.zeros(len(share), vocabulary).scatter_(1, token_SK, share)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers_processors(values: dict[str, Any]) -> None:
    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(1)) * 2
    seen = [3, 4, 30]
    given = logits
    if "repetition_penalty" in values:
        penalty = values["repetition_penalty"]
        given = torch.where(marks(seen, 200, 60), torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    made = in_place(*Sampler(True, **values).weights(given), 60)
    torch.testing.assert_close(made, exact(logits, seen, values), atol=1e-6, rtol=1e-5)


def test_values_equal_to_the_kth_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]])
    made = in_place(*Sampler(True, top_k=2).weights(logits), 6)
    torch.testing.assert_close(made, exact(logits, [], {"top_k": 2}))
    assert (made > 0).sum() == 4


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_50000_draws_have_the_exact_frequencies(values: dict[str, Any]) -> None:
    draws, vocabulary, seen = 50_000, 40, [5, 6]
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(2)) * 1.5
    tokens = Sampler(True, **values).choose(
        logits.expand(draws, -1), torch.full((draws,), 987654321987654321), torch.arange(draws),
        marks(seen, draws, vocabulary),
    )  # fmt: skip
    expected = exact(logits, seen, values)[0].double() * draws
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert not counts[expected == 0].any(), "a token that was filtered out"
    often = expected >= 5
    statistic = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    freedom = int(often.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [-1.0, -2.0, -1.1]])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert Sampler(False).choose(logits, zeros, zeros).tolist() == [1, 0]
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert Sampler(False, repetition_penalty=2.0).choose(logits, zeros, zeros, seen).tolist() == [2, 2]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_unit_interval_give_tokens_that_may_be_drawn(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda key_S, count_S: torch.full(key_S.shape, u))
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(3)) * 3
    sampler = Sampler(True, top_k=9, top_p=0.9)
    zeros = torch.zeros(500, dtype=torch.int64)
    tokens = sampler.choose(logits, zeros, zeros)
    assert (exact(logits, [], {"top_k": 9, "top_p": 0.9}).gather(1, tokens[:, None]) > 0).all()
    if u == 0.0:
        assert (tokens == logits.argmax(dim=-1)).all()


# The numbers


def test_the_numbers_are_fixed_and_so_the_same_on_every_device() -> None:
    key = torch.tensor([0, 1, 2**62 + 12345, 2**63 - 1, 987654321987654321])
    count = torch.tensor([0, 0, 7, 1023, 4095])
    assert (uniform(key, count) * 2**24).long().tolist() == [0, 8835834, 1665396, 7585667, 15263485]


def test_a_plain_integer_version_gives_the_same_numbers() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    keys = torch.randint(0, 2**63 - 1, (500,), generator=torch.Generator().manual_seed(4))
    counts = torch.randint(0, 10**6, (500,), generator=torch.Generator().manual_seed(5))
    for key, count, u in zip(keys.tolist(), counts.tolist(), uniform(keys, counts).tolist(), strict=True):
        first = mix(((key >> 32) + count * 0x1E3779B1) % 2**32)
        assert u == (mix(first ^ (key % 2**32)) >> 8) / 2**24


@pytest.mark.parametrize("along", ["counters", "keys", "high bits of keys"])
def test_the_numbers_are_uniform_and_neighbours_do_not_follow_one_another(along: str) -> None:
    n, bins = 200_000, 200
    steps = torch.arange(n)
    fixed = torch.full((n,), 1234567890123456789)
    key, count = {
        "counters": (fixed, steps), "keys": (fixed + steps, torch.zeros_like(steps)),
        "high bits of keys": (steps << 40, torch.full_like(steps, 3)),
    }[along]  # fmt: skip
    u = uniform(key, count).double()
    counts = torch.bincount((u * bins).long(), minlength=bins).double()
    statistic = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(statistic - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    pairs = torch.bincount((u[:-1] * 20).long() * 20 + (u[1:] * 20).long(), minlength=400).double()
    assert abs(float(((pairs - (n - 1) / 400) ** 2 / ((n - 1) / 400)).sum()) - 399) < 5 * math.sqrt(2 * 399)
    assert float(u.min()) >= 0.0 and float(u.max()) < 1.0
