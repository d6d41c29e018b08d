"""Own blocks, Unsloth and PEFT on a real model: gradients, loss curves, decoding. bench/real.py measures.

Run on a machine with an NVIDIA GPU, with models/smollm2-135m-instruct.gguf there: pytest -m gpu tests/gpu/test_real.py
With REAL_RESULT=FILE, what was measured is kept as a raw result.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from bench import real
    from tools import smollm

    if not smollm.TARGET.is_file():
        pytest.fail(f"{smollm.TARGET} is absent: make smollm, or python -m tools.smollm --join FOLDER")
    target = Path(os.environ.get("REAL_RESULT") or tmp_path_factory.mktemp("real") / "real.json")
    measured = real.measure(str(smollm.TARGET), target)
    print(json.dumps({name: value for name, (value, _) in real.headline(measured).items()}, indent=1))
    for way, each in measured["ways"].items():
        for kind in ("training", "decoding"):
            for setup, found in each[kind].items():
                print(way, kind, setup, json.dumps(found["ran"]))
    return measured


@pytest.mark.parametrize("way", ["fused", "unsloth"])
def test_a_way_agrees_with_peft_on_gradients_losses_and_greedy_tokens(way: str, result: dict[str, Any]) -> None:
    from bench import real

    assert real.problems(result, (way,)) == []
    assert len(result["compared"]) == 8, "two ways, two dtypes, two bases"


def test_each_way_is_the_one_that_it_is_called(result: dict[str, Any]) -> None:
    ways = result["ways"]
    for setup, each in ways["fused"]["training"].items():
        assert "fused_block" in each["ran"]["forward_of_a_layer"] and not each["ran"]["notes"], setup
    for setup, each in ways["unsloth"]["training"].items():
        assert "unsloth" in json.dumps(each["ran"]).lower(), setup
    for setup, each in ways["peft"]["training"].items():
        assert each["ran"]["forward_of_a_layer"].startswith("transformers."), setup
