"""Each way of training does the same work on a card: the bench compares it, and refuses none.

Run on a machine with an NVIDIA GPU: pytest -m gpu
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import compare

pytestmark = pytest.mark.gpu

RECIPE = (
    "model: {name_or_path: fast_ft/pocket/base, max_length: 256, dtype: float16}\n"
    "data: {train: fast_ft/pocket/train.json}\n"
    "select: {take: 12, deduplicate: none}\n"
    "train: {num_train_epochs: 10, learning_rate: 1e-3, warmup_steps: 3}\n"
)


def test_all_ways_do_the_same_work(tmp_path: Path) -> None:
    recipe = tmp_path / "pocket.yaml"
    recipe.write_text(RECIPE)
    ways = ["unsloth-notebook", "unsloth-budget", "unsloth-budget-kept", "trl-peft"]
    assert bench.main([str(recipe), "--only", ",".join(["fast_ft", *ways]), "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "pocket-train.json").read_text())
    parts = result["setups"]["whole"]
    assert {way: compare.disagreements(parts["fast_ft"], parts[way]) for way in ways} == {way: [] for way in ways}
    assert parts["unsloth-budget"]["steps"][0]["passes"] == 1  # 8 short rows are far below the budget
