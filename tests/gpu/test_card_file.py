"""Ten minutes of a card's owner, in less: all parts on a card, in a T4's float16, Unsloth's layers among them.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_card_file.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import card_file, card_table
from bench.card_scale import Scale

pytestmark = pytest.mark.gpu


def test_all_parts_measure_and_the_two_ways_agree(tmp_path: Path) -> None:
    whole = Scale()
    scale = Scale(
        config=whole.config | {"num_hidden_layers": 4}, layers=2, least=2.0, most=4.0, window=0.2, dtype="float16"
    )
    order = card_file.Order(tmp_path / "submit.json", scale=scale)
    content = card_file.measure(order)
    shown = json.loads(json.dumps(content))
    for part in shown["parts"].values():
        (part.get("gradient") or {}).pop("sketch", None)
    print(json.dumps(shown, indent=1)[:20000])
    assert {name: part.get("failed") for name, part in content["parts"].items()} == dict.fromkeys(content["parts"])
    found = card_table.facts(content, "submit.json")
    print(found)
    assert found["training"]["agrees"], found["training"]
    assert content["parts"]["ours"]["dtype"] == content["parts"]["unsloth"]["dtype"] == "float16"
    assert content["parts"]["unsloth"]["backend"] == "unsloth" and content["parts"]["ours"]["backend"] == "fused"
    assert content["parts"]["whole"]["simple"]["backend"] == "fused" and found["simple_minutes"] < 1
    assert found["decode"]["ours"] and found["decode"]["bitsandbytes"] and found["works"] is not None
    assert json.loads(order.path.read_text()) == json.loads(json.dumps(content))
