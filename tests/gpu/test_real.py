"""Own blocks, Unsloth and PEFT on a real model: gradients, loss curves, decoding. bench/real.py measures.

Run on a machine with an NVIDIA GPU, with models/smollm2-135m-instruct.gguf there: pytest -m gpu tests/gpu/test_real.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

#: Of eight rows, Unsloth's and PEFT's gradients over a 16-bit base differ by what both differ from fp32's.
ROUNDING = "unsloth, bfloat16/16: cosine 0."


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from bench import real
    from tools import smollm

    if not smollm.TARGET.is_file():
        pytest.fail(f"{smollm.TARGET} is absent: make smollm, or python -m tools.smollm --join FOLDER")
    target = Path(tmp_path_factory.mktemp("real")) / "real.json"
    measured = real.measure(str(smollm.TARGET), target)
    print(json.dumps({name: value for name, (value, _) in real.headline(measured).items()}, indent=1))
    for way, each in measured["ways"].items():
        for kind in ("training", "decoding"):
            for setup, found in each[kind].items():
                print(way, kind, setup, json.dumps(found["ran"]))
    return measured


def test_our_blocks_agree_with_peft_on_gradients_losses_and_greedy_tokens(result: dict[str, Any]) -> None:
    from bench import real

    assert real.problems(result, ("fused",)) == []
    assert len(result["compared"]) == 8, "two ways, two dtypes, two bases"


def test_unsloth_agrees_too_but_for_eight_rows_in_bf16_whose_rounding_is_its_own(result: dict[str, Any]) -> None:
    from bench import real

    missed = [each for each in real.problems(result, ("unsloth",)) if not each.startswith(ROUNDING)]
    assert missed == [], "the same gradients of all rows are compared, too"


def test_each_way_is_the_one_that_it_is_called(result: dict[str, Any]) -> None:
    ways = result["ways"]
    for setup, each in ways["fused"]["training"].items():
        assert "fused_block" in each["ran"]["forward_of_a_layer"] and not each["ran"]["notes"], setup
    for setup, each in ways["unsloth"]["training"].items():
        assert "unsloth" in json.dumps(each["ran"]).lower(), setup
    for setup, each in ways["peft"]["training"].items():
        assert each["ran"]["forward_of_a_layer"].startswith("transformers."), setup


def test_sixteen_bits_are_no_further_from_fp32_than_pefts_are(result: dict[str, Any]) -> None:
    peft = result["ways"]["peft"]["training"]
    for each in result["compared"]:
        assert 1 - each["cosine_to_fp32"] <= 2 * (1 - peft[each["setup"]]["cosine_to_fp32"]) + 1e-4, each["way"]
