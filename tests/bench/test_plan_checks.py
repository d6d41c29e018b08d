"""The plan against five runs: which runs they are, what comes out of them, and the random bases that they train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import plan_bases, plan_checks, plan_samples, random_checkpoint, training
from bench.figures import RESULTS
from bench.process import WaitingProcess, card_to_itself
from fast_ft.hub.families import FamilySpec
from fast_ft.recipe import loader
from tests.helpers.parts import POCKET
from tests.helpers.patience import PATIENCE

RECIPE = "bench/recipes/first-100.yaml"
PLAN = {"micro_batch": 8, "most_tokens": 2048}


def case(planned: float, measured: float, seconds: float = 1.0, **values: Any) -> dict[str, Any]:
    return {
        "planned_gib": planned, "measured_gib": measured, "planned_step_seconds": [1.0, 2.0, 1.0],
        "measured_step_seconds": [seconds, 3 * seconds, 0.0], "plan": PLAN, "plan_at_the_end": PLAN, **values,
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


@pytest.mark.parametrize("spoilt", [{"plan_at_the_end": PLAN | {"most_tokens": 900}}, {"planned_gib": 0.0}], ids=str)
def test_a_run_that_took_another_plan_makes_no_figure(spoilt: dict[str, Any]) -> None:
    assert plan_checks.figures(five(first=spoilt)) == {}
    few = five()
    del few["cases"][next(iter(plan_checks.CASES))]
    assert plan_checks.figures(few) == {}


def test_the_five_runs_are_valid_recipes_and_differ_from_those_that_were_fitted_on() -> None:
    sampled = [FamilySpec.from_config(each.config).shape for each in plan_samples.SAMPLES.values()]
    seen = [json.loads(path.read_text(encoding="utf-8"))["cases"] for path in RESULTS.glob("*plans*.json")]
    former = {name: each for cases in seen for name, each in cases.items() if name not in plan_checks.CASES}
    for name, each in plan_checks.CASES.items():
        loader.load_recipe(RECIPE, list(each.overrides))
        assert name not in former
        assert all(old.get("overrides") != list(each.overrides) for old in former.values()) or each.base != "llama-2-7b"
        shape = FamilySpec.from_config(dict(plan_bases.BASES[each.base])).shape
        assert each.base == "llama-2-7b" or shape not in sampled
    assert {each.base for each in plan_checks.CASES.values()} == set(plan_bases.BASES)
    assert len({each.base for each in plan_checks.CASES.values()}) == len(plan_checks.CASES) == 5


def _order(path: Path) -> training.Order:
    where = training.setup(None, 8, 14.7)
    overrides = [f"model.tokenizer={POCKET}"]
    return training.Order(path, RECIPE, overrides, where, timeout=PATIENCE, again=False, command="python -m bench")


def test_runs_take_turns_after_their_bases_are_written_and_one_that_failed_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real processes, which do nothing but say that it is their turn."""
    said = tmp_path / "said"
    script = (
        "import json, pathlib, sys\n"
        "from bench.process import wait_for_turn\n"
        "wait_for_turn()\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        f"said, name = pathlib.Path({str(said)!r}), job['case']\n"
        "failing = 'SmolLM2' in name and not said.with_suffix('.again').exists()\n"
        "line = f'{name}: {pathlib.Path(job[\"base\"]).is_dir()}\\n'\n"
        "said.write_text((said.read_text() if said.exists() else '') + line)\n"
        "pathlib.Path(job['out']).write_text(json.dumps(job['changes']))\n"
        "sys.exit(3 if failing else 0)\n"
    )
    written: list[list[str]] = []
    there = tmp_path / "bases"

    def write(names: list[str], tokenizer: Path, log: Path) -> None:
        written.append(names)
        for name in names:
            (there / name).mkdir(parents=True)

    real = plan_checks.WaitingProcess
    monkeypatch.setattr(plan_bases, "write", write)
    monkeypatch.setattr(plan_bases, "folder", lambda name: there / name)
    monkeypatch.setattr(
        plan_checks, "WaitingProcess", lambda command, log: real([sys.executable, "-c", script, command[-1]], log)
    )
    result = plan_checks.measure(_order(tmp_path / "plans.json"))
    names = list(plan_checks.CASES)
    assert said.read_text().splitlines() == [f"{name}: True" for name in names]
    assert written == [[each.base for each in plan_checks.CASES.values()]]
    assert set(result["cases"]) == {name for name in names if "SmolLM2" not in name}
    assert json.loads((tmp_path / "plans.json").read_text())["cases"] == result["cases"]
    said.with_suffix(".again").touch()
    again = plan_checks.measure(_order(tmp_path / "plans.json"))
    assert set(again["cases"]) == set(names) and len(said.read_text().splitlines()) == 6
    assert len(written) == 1, "the bases are there"


def test_a_measurement_has_the_card_to_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fcntl

    monkeypatch.delenv("GPU_LOCK", raising=False)
    with card_to_itself():
        pass
    monkeypatch.setenv("GPU_LOCK", str(tmp_path / "lock"))
    with (tmp_path / "lock").open("a") as other:
        with card_to_itself(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_bases_are_written_once_where_no_card_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(plan_bases, "run_process", lambda command, log, timeout: ran.append(command[3:]))
    monkeypatch.setattr(plan_bases.tempfile, "gettempdir", lambda: str(tmp_path))
    plan_bases.write(["llama-2-13b"], POCKET, tmp_path / "log")
    assert ran == [[str(POCKET), "llama-2-13b"]]
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 64}  # fmt: skip
    monkeypatch.setitem(plan_bases.BASES, "llama-2-13b", {**plan_bases.BASES["llama-2-13b"], **small})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert plan_bases.main([str(POCKET), "llama-2-13b"]) == 0
    assert plan_bases.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert [each.name for each in plan_bases.folder("llama-2-13b").parent.iterdir()] == ["llama-2-13b"]
    plan_bases.write(["llama-2-13b"], POCKET, tmp_path / "log")
    assert len(ran) == 1


def test_a_process_that_waits_for_its_turn_is_ended_with_what_it_started(tmp_path: Path) -> None:
    waiting = WaitingProcess([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    assert waiting.run(0.2) == "nothing after 0 s"
    waiting.end()
    failing = WaitingProcess([sys.executable, "-c", "raise SystemExit(4)"], tmp_path / "log")
    assert failing.run(PATIENCE) == 4
    failing.end()


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
    from fast_ft.models.random_base import SHAPES, random_model
    from fast_ft.recipe import schema

    small = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 256,
    }  # fmt: skip
    config = {**SHAPES["mistral-7b"], **small}
    random_checkpoint.write(tmp_path / "base", config, POCKET)
    section = schema.Model(name_or_path=str(tmp_path / "base"), dtype="float16", load_in_4bit=True)
    loaded = choose.make_loader(section, schema.Lora(), seed=1, name="peft").for_training().model.get_base_model()
    assert type(loaded).__name__ == "MistralForCausalLM"
    drawn = random_model({**config, "num_hidden_layers": 1, "vocab_size": 1000}, "float16", r=1).unload()
    assert loaded.lm_head.weight[1000:].equal(loaded.lm_head.weight[:1048]), "a thousand tokens' weights, repeated"
    for made in loaded.model.layers:
        expected = drawn.model.layers[0]
        for name in ("q_proj", "k_proj"):
            weight, other = getattr(made.self_attn, name).base_layer.weight, getattr(expected.self_attn, name).weight
            assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
            both = [dequantize_4bit(each.data, each.quant_state) for each in (weight, other)]
            assert torch.equal(*both)
