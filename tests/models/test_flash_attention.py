"""Which heads go to torch's flash attention, and how a window is said to it. What it computes, cards test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fast_ft.models import flash_attention


class Heads:
    """What `takes` looks at of a tensor on a card."""

    def __init__(self, size: int = 128, dtype: torch.dtype = torch.float16, *, is_cuda: bool = True) -> None:
        self.is_cuda, self.dtype, self.shape, self.device = is_cuda, dtype, (1, 5, 2, size), "cuda:0"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card whose capability, and torch's own switches, can be set."""
    said: dict[str, Any] = {"capability": (8, 0), "on": True, "built": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: said["capability"])
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: said["on"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: said["built"])
    return said


def takes(heads: Heads) -> bool:
    return flash_attention.takes(heads)  # type: ignore[arg-type]


def test_newer_cards_take_it_for_16_bit_heads(card: dict[str, Any]) -> None:
    assert takes(Heads()) and takes(Heads(64)) and takes(Heads(96)) and takes(Heads(dtype=torch.bfloat16))
    assert not takes(Heads(dtype=torch.float32)) and not takes(Heads(256)) and not takes(Heads(20))
    assert not takes(Heads(is_cuda=False)) and not flash_attention.takes(torch.zeros(1, 5, 2, 64).half())


NO = {"capability": (7, 5), "on": False, "built": False}


@pytest.mark.parametrize(("name", "value"), NO.items())
def test_a_t4_and_torchs_own_switch_say_no(card: dict[str, Any], name: str, value: Any) -> None:
    card[name] = value
    assert not takes(Heads())


def test_a_window_counts_the_tokens_before_ones_own() -> None:
    assert flash_attention._sizes(None) == {}
    assert flash_attention._sizes(20) == {"window_size_left": 19, "window_size_right": 0}
