"""The plan against five runs: which runs they are, what comes out of them, and the random bases that they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plan_checks, random_checkpoint, training
from fast_ft.recipe import loader
from tests.helpers.parts import POCKET

RECIPE = "bench/recipes/first-100.yaml"
PLAN = {"micro_batch": 8, "most_tokens": 2048}


def case(planned: float, measured: float, seconds: float = 1.0, **values: Any) -> dict[str, Any]:
    return {
        "planned_gib": planned, "measured_gib": measured, "planned_step_seconds": [1.0, 1.0, 9.0],
        "measured_step_seconds": [seconds, seconds, 7.0], "plan": PLAN, "plan_at_the_end": PLAN, **values,
    }  # fmt: skip


def five(**changed: Any) -> dict[str, Any]:
    cases = {name: case(10.0, 10.0 - index / 10) for index, name in enumerate(plan_checks.CASES)}
    first, *_, last = cases
    return {"cases": cases | {first: case(10.0, 10.05, 0.8) | changed.get("first", {}), last: case(10.0, 9.7)}}


def test_errors_are_the_worst_of_five_and_what_lies_above_the_plan_is_told_apart() -> None:
    found = {name: value for name, (value, _) in plan_checks.figures(five()).items()}
    assert found == {
        "plan.peak_error": round(10 / 9.7 - 1, 4), "plan.peak_over": 0.005, "plan.minutes_error": 0.25,
    }  # fmt: skip
    below = {"cases": {name: case(10.0, 9.9) for name in plan_checks.CASES}}
    assert plan_checks.figures(below)["plan.peak_over"][0] == 0.0


@pytest.mark.parametrize(
    "spoilt", [{"plan_at_the_end": PLAN | {"most_tokens": 900}}, {"out_of_memory": True}, {"planned_gib": 0.0}], ids=str
)
def test_a_run_that_took_another_plan_makes_no_figure(spoilt: dict[str, Any]) -> None:
    assert plan_checks.figures(five(first=spoilt)) == {}
    few = five()
    del few["cases"][next(iter(plan_checks.CASES))]
    assert plan_checks.figures(few) == {}


def test_the_five_runs_are_valid_recipes_and_differ_from_those_that_were_fitted_on() -> None:
    fitted = json.loads(Path("bench/results/h200-plans.json").read_text(encoding="utf-8"))["cases"]
    for name, each in plan_checks.CASES.items():
        loader.load_recipe(RECIPE, list(each.overrides))
        assert each.base in plan_checks.BASES and name not in fitted
        same = [old for old in fitted.values() if old["overrides"] == list(each.overrides)]
        assert not same or each.base != "llama", "those were all of Llama-2-7B's shape"
    assert {each.base for each in plan_checks.CASES.values()} == set(plan_checks.BASES)


def test_bases_are_written_once_and_a_run_that_failed_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    failing = "16 rows a step, 7.2 GiB"

    def run_way(job: dict[str, Any], log: Path, timeout: float, module: str) -> dict[str, Any] | None:
        ran.append(job["way"])
        if module == "bench.random_checkpoint":
            assert job["config"] == plan_checks.BASES[Path(job["base"]).name]
            Path(job["base"]).mkdir()
        else:
            assert Path(job["base"]).is_dir()
        return None if job["way"] == failing else {"way": job["way"]}

    monkeypatch.setattr(plan_checks, "run_way", run_way)
    overrides = [f"model.tokenizer={POCKET}"]
    where = training.setup(None, 8, 14.7)
    order = training.Order(
        tmp_path / "plans.json", RECIPE, overrides, where, timeout=9, again=False, command="python -m bench"
    )
    result = plan_checks.measure(order)
    assert [way for way in ran if way.startswith("base")] == ["base llama", "base mistral"]
    assert [way for way in ran if way in plan_checks.CASES] == list(plan_checks.CASES)
    assert set(result["cases"]) == set(plan_checks.CASES) - {failing}
    assert json.loads((tmp_path / "plans.json").read_text())["cases"] == result["cases"]
    ran.clear()
    plan_checks.measure(order)
    assert ran == ["base llama", failing]


def test_rows_are_as_long_as_they_were_wanted(tmp_path: Path) -> None:
    recipe = loader.load_recipe(
        RECIPE, [f"model.name_or_path={POCKET}", f"data.train={POCKET.parent / 'train.json'}", "model.max_length=256"]
    )
    rows = json.loads(plan_checks.long_rows(recipe, tmp_path / "rows.json", 100, count=4).read_text())
    from fast_ft.data.encoding import Encoder

    encoder = Encoder(POCKET)
    for row in rows:
        (asked,), (answer,) = encoder.count([row["conversations"][0]["value"]], [row["conversations"][1]["value"]])
        assert 90 <= asked + answer <= 100


def test_a_written_base_is_loaded_with_the_weights_that_were_drawn(tmp_path: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from fast_ft.models.loaders import choose
    from fast_ft.models.random_base import random_model
    from fast_ft.recipe import schema

    small = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 256,
    }  # fmt: skip
    config = dict(plan_checks.BASES["mistral"]) | small
    random_checkpoint.write(tmp_path / "base", config, POCKET)
    section = schema.Model(name_or_path=str(tmp_path / "base"), dtype="float16", load_in_4bit=True)
    loaded = choose.make_loader(section, schema.Lora(), seed=1, name="peft").for_training().model.get_base_model()
    assert type(loaded).__name__ == "MistralForCausalLM"
    drawn = random_model({**config, "model_type": "llama"}, "float16", r=1).unload()
    for made, expected in zip(loaded.model.layers, drawn.model.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            weight, other = getattr(made.self_attn, name).base_layer.weight, getattr(expected.self_attn, name).weight
            assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
            both = [dequantize_4bit(each.data, each.quant_state) for each in (weight, other)]
            assert torch.equal(*both)
