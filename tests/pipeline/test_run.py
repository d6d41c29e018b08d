"""The whole run on a CPU, through PEFT and NF4: recipe in; adapter, pred.json and manifest out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files, console
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import prepare
from fast_ft.generate import answers
from fast_ft.pipeline import train_phase
from fast_ft.pipeline.opening import opened
from fast_ft.pipeline.rerun import generate_again
from fast_ft.pipeline.run import run
from fast_ft.plan import planner
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.parts import RecipeFactory, write_recipe


def go(path: Path, *overrides: str, until: str = "pred") -> RunDir:
    return run(load_recipe(path, overrides), path, until=until)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): atomic_files.sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def one_run(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("one")
    return go(write_recipe(folder, tiny, train_file, test_file)).root


@pytest.fixture
def finished(recipe_file: RecipeFactory, one_run: Path, tmp_path: Path) -> tuple[Path, RunDir]:
    """A recipe, and its finished run in a folder of the test's own."""
    copy = tmp_path / "run"
    shutil.copytree(one_run, copy)
    return recipe_file({"output_dir": str(copy)}), RunDir.at(copy)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: Any, units: int) -> Callable[[], None]:
    """Press Ctrl-C when a module's bar has come so far."""

    class Interrupted(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done >= units:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "Bar", Interrupted)
    return lambda: monkeypatch.setattr(module, "Bar", console.Bar)


@pytest.mark.pictures
def test_a_run_leaves_adapter_answers_and_a_manifest(finished: tuple[Path, RunDir], test_file: Path) -> None:
    _, folder = finished
    names = {path.name for path in folder.root.iterdir()}
    look = {"report.html", "map.png", "loss.png"}
    assert (
        names
        == {"adapter", "checkpoints", "manifest.json", "plan.json", "log.jsonl", "pred.json", "answers.json"} | look
    )
    ends = json.loads(folder.answers.read_text(encoding="utf-8"))["tuned"]
    assert len(ends) == 5 and all(1 <= end["tokens"] <= 6 for end in ends.values())
    assert all(end["ended"] or end["tokens"] == 6 for end in ends.values())
    adapter = {path.name for path in folder.adapter.iterdir()}
    assert adapter >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}
    assert not [path for path in folder.root.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".new")]

    manifest = folder.manifest()
    train, generated = manifest["phases"]["train"], manifest["phases"]["generate"]
    assert (train["backend"], train["dtype"], train["steps"], train["skipped_steps"]) == ("peft", "float32", 6, 0)
    assert generated["answers"] == 5 and generated["adapter_difference_nats"] < 1e-4
    assert 0 <= generated["batched_difference_nats"] < 1e-4
    assert len(manifest["rows"]) == 16 and all(len(row["digest"]) == 64 for row in manifest["rows"])
    assert [(s["name"], len(s["ids"])) for s in manifest["stages"]] == [("easy", 8), ("all", 16)]
    assert manifest["carry"] == {"optimizer": True, "schedule": True}
    assert manifest["digests"]["pred"] == atomic_files.sha256_file(folder.pred)
    assert manifest["digests"]["adapter"] == atomic_files.sha256_file(folder.adapter / "adapter_model.safetensors")
    assert manifest["digests"].keys() >= {"train", "test"}
    assert manifest["environment"]["packages"]["torch"]

    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert train["tokens"] == sum(line["tokens"] for line in lines)
    assert folder.loss_png.read_bytes().startswith(b"\x89PNG")

    pred, prompts = read(folder.pred), read(test_file)
    assert list(pred) == [row["id"] for row in prompts]
    for row in prompts:
        entry = pred[row["id"]]
        assert entry["input"] == [{"role": "user", "content": row["conversations"][0]["value"]}]
        assert [type(text) for text in entry["output"]] == [str] and entry.keys() == {"input", "output"}


def test_plain_peft_loads_the_adapter(finished: tuple[Path, RunDir], tiny: Path) -> None:
    import peft
    import transformers

    _, folder = finished
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny))
    model = peft.PeftModel.from_pretrained(base, str(folder.adapter))
    assert any(float(p.abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert transformers.AutoTokenizer.from_pretrained(str(folder.adapter)).eos_token_id == 2


def test_the_same_command_again_does_nothing(finished: tuple[Path, RunDir], capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = finished
    before = digests(folder.root)
    capsys.readouterr()
    assert go(path).root == folder.root
    assert digests(folder.root) == before
    assert "training" not in capsys.readouterr().err


def test_two_runs_of_one_recipe_are_equal(finished: tuple[Path, RunDir], tmp_path: Path) -> None:
    path, folder = finished
    other = go(path, f"output_dir={tmp_path}/other")
    assert other.manifest()["digests"] == folder.manifest()["digests"]


def test_a_run_up_to_the_adapter_goes_on_to_the_answers(recipe_file: RecipeFactory) -> None:
    path = recipe_file()
    folder = go(path, until="adapter")
    assert not folder.pred.exists() and folder.done("generate") is None
    before = digests(folder.adapter)
    assert go(path).pred.is_file() and digests(folder.adapter) == before


def test_a_stopped_training_goes_on_to_the_same_adapter(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"train.save_steps": 2, "train.neftune_noise_alpha": 5, "lora.lora_dropout": 0.1}
    path = recipe_file(changes)
    whole = go(path, f"output_dir={tmp_path}/whole", until="adapter")
    release = interrupt_at(monkeypatch, train_phase, 5)
    with pytest.raises(KeyboardInterrupt):
        go(path, until="adapter")
    release()
    folder = go(path, until="adapter")
    assert folder.manifest()["digests"]["adapter"] == whole.manifest()["digests"]["adapter"]
    losses = [[json.loads(line)["loss"] for line in each.log.read_text().splitlines()] for each in (folder, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert (folder.done("train") or {})["steps"] == 6


def test_stopped_answers_go_on_to_the_same_answers(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    path = recipe_file({"generate": {"max_new_tokens": 5, "batch_size": 2}})
    whole = go(path, f"output_dir={tmp_path}/whole")
    release = interrupt_at(monkeypatch, answers, 2)
    with pytest.raises(KeyboardInterrupt):
        go(path)
    release()
    (partial,) = tmp_path.glob("runs/*/pred.partial.jsonl")
    assert len(partial.read_text().splitlines()) == 2 and not (partial.parent / "pred.json").exists()
    folder = go(path)
    assert read(folder.pred) == read(whole.pred) and not partial.exists()


def test_a_stop_after_the_last_answer_leaves_out_what_was_not_measured(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of 0.0 nats would read as a measurement."""
    path = recipe_file()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fast_ft.pipeline.generate_phase._put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        go(path)
    folder = go(path)
    generated = folder.done("generate") or {}
    assert generated["answers"] == 5 and "batched_difference_nats" not in generated
    assert folder.report.is_file()


def test_the_seconds_of_answering_are_divided(finished: tuple[Path, RunDir]) -> None:
    """What a run spends on loading, set-up, checks and captures can be read off beside prefill and steps."""
    generated = finished[1].done("generate") or {}
    parts = generated["seconds_by"]
    assert parts.keys() == {"loading", "set_up", "checks", "prefill", "steps", "other"}
    assert all(seconds > 0 for seconds in parts.values())
    # What stands before and after is checking prompts and writing files; beside other work it too takes longer.
    assert 0.7 * generated["seconds"] - 0.1 <= sum(parts.values()) <= generated["seconds"] + 0.01
    assert generated["decoding_steps"] >= 2 * 5 and generated["cache_tokens"] % 16 == 0


def test_without_a_test_file_a_run_ends_with_the_adapter(recipe_file: RecipeFactory) -> None:
    folder = go(recipe_file({"data.test": None}))
    assert folder.done("train") and folder.done("generate") is None and not folder.pred.exists()
    with pytest.raises(InputError, match=r"no prompts to answer.*data\.test"):
        generate_again(folder.root, [])


def test_max_steps_ends_a_run_within_its_first_stage(recipe_file: RecipeFactory) -> None:
    folder = go(recipe_file({"train.max_steps": 1, "train.warmup_steps": 0}), until="adapter")
    assert (folder.done("train") or {})["steps"] == 1
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-1"]


def test_a_loss_that_is_no_number_ends_in_a_message(recipe_file: RecipeFactory) -> None:
    """A learning rate beyond all reason: the log keeps its NaN, and no adapter is passed off as trained."""
    path = recipe_file({"train.learning_rate": 1e30, "train.max_grad_norm": 0})
    with pytest.raises(InputError, match=r"not finite.*learning_rate"):
        go(path)
    (log,) = path.parent.glob("runs/*/log-diverged.jsonl")
    assert any(not math.isfinite(json.loads(line)["loss"]) for line in log.read_text().splitlines())
    assert RunDir.at(log.parent).done("train") is None and not (log.parent / "adapter").exists()


def test_generating_again_keeps_the_former_answers(finished: tuple[Path, RunDir]) -> None:
    _, folder = finished
    old = folder.pred.read_bytes()
    digest = atomic_files.sha256_file(folder.pred)
    adapter = digests(folder.adapter)
    assert generate_again(folder.root, ["generate.max_new_tokens=2", "generate.batch_size=1"]) == folder.pred
    assert (folder.root / f"pred-{digest[:8]}.json").read_bytes() == old
    assert folder.pred.read_bytes() != old and list(read(folder.pred)) == list(json.loads(old))
    manifest = folder.manifest()
    assert manifest["digests"]["pred"] == atomic_files.sha256_file(folder.pred)
    assert manifest["generated_with"]["max_new_tokens"] == 2
    assert manifest["phases"]["generate"]["batch_size"] == 1, "the plan's 3 gives way"
    assert digests(folder.adapter) == adapter


def test_generating_again_in_vain_leaves_the_former_answers_in_place(finished: tuple[Path, RunDir]) -> None:
    _, folder = finished
    before = digests(folder.root)
    for override, message in (
        ("data.test=nowhere.json", "nowhere.json"),
        ("lora.r=8", "only generate"),
        ("generate.max_new_tokens=250", "over the model's context of 256"),
    ):
        with pytest.raises(InputError, match=message):
            generate_again(folder.root, [override])
        assert digests(folder.root) == before, override


def test_generating_without_an_adapter_is_refused(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    path = recipe_file()
    empty = RunDir.open(load_recipe(path), path)
    with pytest.raises(InputError, match="has no adapter yet"):
        generate_again(empty.root, [])
    with pytest.raises(InputError, match="no such run folder"):
        generate_again(tmp_path / "nowhere", [])


def test_an_adapter_that_was_swapped_is_not_used(finished: tuple[Path, RunDir], tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = finished
    weights = folder.adapter / "adapter_model.safetensors"
    save_file({name: t * 1.5 for name, t in load_file(str(weights)).items()}, str(weights))
    before = digests(folder.root)
    with pytest.raises(InputError, match="this adapter is not what was trained"):
        generate_again(folder.root, [])
    assert digests(folder.root) == before


# What is refused before anything is trained leaves nothing behind


def test_another_model_under_the_homeworks_rules_is_refused(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hidden_size 64, LLaMA2-7B has 4096"):
        go(recipe_file({"rules": "ntu-ml-2025-hw5"}))
    assert not (tmp_path / "runs").exists()


def test_a_model_without_weights_is_refused(recipe_file: RecipeFactory, tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="holds no weights"):
        go(recipe_file({"model.name_or_path": str(base)}))
    assert not (tmp_path / "runs").exists()


def test_the_test_file_as_training_data_is_refused(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy.json").write_bytes(train_file.read_bytes())
    with pytest.raises(InputError, match="this is the test set"):
        go(recipe_file({"data.test": str(tmp_path / "copy.json")}))
    assert not (tmp_path / "runs").exists()


def test_rows_over_max_length_are_refused_or_dropped_with_a_count(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"over model\.max_length 40[\s\S]*data\.overlong: drop"):
        go(recipe_file({"model.max_length": 40}))
    assert not (tmp_path / "runs").exists()
    folder = go(recipe_file({"model.max_length": 40, "data.overlong": "drop", "data.test": None}))
    manifest = folder.manifest()
    (text,) = [text for text in manifest["notes"] if "were dropped" in text]
    assert int(text.split()[0]) == 16 - len(manifest["rows"]) > 0
    with pytest.raises(InputError, match="no row is left to train on"):
        go(recipe_file({"model.max_length": 8, "data.overlong": "drop"}))


@pytest.mark.parametrize("only_answers", [True, False])
def test_the_plan_counts_the_tokens_that_are_trained(recipe_file: RecipeFactory, only_answers: bool) -> None:
    """The first token of a row is never one of them: nothing predicts it."""
    recipe = load_recipe(recipe_file({"train.completion_only_loss": only_answers, "data.test": None}))
    planned = planner.describe(recipe, prepare(recipe), None)["stages"]
    trained = run(recipe, "small.yaml", until="adapter").done("train") or {}
    assert sum(stage["supervised_tokens"] for stage in planned) == trained["supervised_tokens"]


def test_a_tokenizer_that_is_not_the_models_is_refused_or_noted(
    recipe_file: RecipeFactory, tiny: Path, tmp_path: Path
) -> None:
    import tokenizers

    other = tmp_path / "other"
    other.mkdir()
    for path in tiny.glob("tokenizer*"):
        (other / path.name).write_bytes(path.read_bytes())
    rotated = read(other / "tokenizer.json")
    vocabulary = rotated["model"]["vocab"]
    words = [word for word, index in vocabulary.items() if index >= 400]
    rotated["model"]["vocab"] |= {w: vocabulary[v] for w, v in zip(words, words[1:] + words[:1], strict=True)}
    (other / "tokenizer.json").write_text(json.dumps(rotated), encoding="utf-8")
    tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    with pytest.raises(InputError, match="other ids than the model's own on every row"):
        go(recipe_file({"model.tokenizer": str(other)}))


def test_a_run_reports_the_test_prompts_that_it_trains_on_and_keeps_them(
    recipe_file: RecipeFactory, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read(train_file)
    exact, other = (row["conversations"][0]["value"] for row in rows[4:6])
    asked = {"same": exact, "alike": f"  {other.upper()}!", "apart": "Name a river."}
    test = [{"id": id_, "conversations": [{"from": "human", "value": text}]} for id_, text in asked.items()]
    (tmp_path / "asked.json").write_text(json.dumps(test), encoding="utf-8")
    path = recipe_file({"data.test": str(tmp_path / "asked.json"), "select.take": 24})
    with opened(load_recipe(path), path, prepare(load_recipe(path))) as folder:
        found = folder.manifest()
    assert (found["leakage"]["examples"], found["leakage"]["prompts"]) == (24, 3)
    assert sorted(found["leakage"]["hits"], key=lambda hit: hit["prompt"]) == [
        {"example": rows[5]["id"], "prompt": "alike", "kind": "normalised"},
        {"example": rows[4]["id"], "prompt": "same", "kind": "exact"},
    ]
    assert {row["id"] for row in found["rows"]} == {row["id"] for row in rows}, "it reports, and takes nothing out"
    assert "2 selected rows with a test prompt's text" in capsys.readouterr().err
