"""Bases of all kinds through whole runs: trained, saved, reloaded, answered; or refused before anything is loaded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.cli.chat import chat
from fast_ft.cli.main import main
from fast_ft.common import gpu
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import prepare
from fast_ft.export.export import Export
from fast_ft.generate.engine.library_engine import LibraryEngine
from fast_ft.hub import download
from fast_ft.pipeline.rerun import generate_again
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from tests.helpers import bases
from tests.helpers.parts import RecipeFactory

SMALL = {"model.load_in_4bit": False, "curriculum": {}, "select.take": 8}


def made(file: Path, *overrides: str) -> tuple[Recipe, RunDir]:
    recipe = load_recipe(file, list(overrides))
    return recipe, run(recipe, file)


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3", "phi3", "granite"])
def test_a_run_equals_transformers_and_peft(name: str, recipe_file: RecipeFactory, tmp_path: Path) -> None:
    """The first step's loss, and each greedy answer of the saved adapter, as plain libraries have them."""
    import peft
    import torch
    import transformers

    base = bases.save_base(tmp_path / "base", name)
    recipe, folder = made(recipe_file({"model.name_or_path": str(base), **SMALL}))
    prepared = prepare(recipe)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    job = prepared.jobs[0]
    rows = [job.rows[index] for index in job.batches[0]]
    assert max(len(row.input_ids) for row in rows) > bases.WINDOW
    with torch.no_grad():
        pairs = [(torch.tensor([row.input_ids]), torch.tensor([row.labels])) for row in rows]
        losses = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in pairs]
    trained = [row.supervised for row in rows]
    loss = sum(a * b for a, b in zip(losses, trained, strict=True)) / sum(trained)
    assert json.loads(folder.log.read_text().splitlines()[0])["loss"] == pytest.approx(loss, abs=1e-4)
    model = peft.PeftModel.from_pretrained(model, folder.adapter).eval()
    for prompt, ids in zip(prepared.prompts, prepared.prompt_ids, strict=True):
        new = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert json.loads(folder.pred.read_text())[prompt.id]["output"] == [
            prepared.encoder.decode(new[0, len(ids) :].tolist())
        ]
    said = [text for text in folder.manifest()["notes"] if text.startswith("general way")]
    assert bool(said) == (name in bases.GENERAL)
    for phase in ("train", "generate"):
        assert bool(folder.done(phase).get("general_way")) == (name in bases.GENERAL)


@pytest.mark.parametrize("skipped", [["lm_head", "model.layers.0.mlp", "v_proj"], ["model.layers.1.mlp"]], ids=str)
def test_a_base_of_4_and_16_bits_is_trained_answered_and_merged(
    skipped: list[str], recipe_file: RecipeFactory, tiny: Path, tmp_path: Path
) -> None:
    """Whichever of its layers were left in 16 bits; its head, where it was not, takes it the general way."""
    base = bases.save_in_4_bits(tmp_path / "base", tiny, skipped)
    _, folder = made(recipe_file({"model.name_or_path": str(base), "model.dtype": "float32", **SMALL}))
    assert bool(folder.done("generate").get("general_way")) == ("lm_head" not in skipped)
    assert len(json.loads(folder.pred.read_text())) == 5
    out = Export.of(str(folder.root), output=str(tmp_path / "out")).merged_model()
    record = json.loads((out / "fast_ft_export.json").read_text(encoding="utf-8"))
    assert record["against_adapter"]["nats"] < 1e-3
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_plan_and_chat_know_the_general_way(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.save_base(tmp_path / "base", "gemma3")
    file = recipe_file({"model.name_or_path": str(base), **SMALL})
    for more in ([], ["--gpu", "t4"]):
        assert main(["plan", str(file), *more]) == 0
        assert "general way: model_type 'gemma3_text' has no blocks of ours" in capsys.readouterr().out
    _, folder = made(file)
    lines = iter(["For this question there is no memory?", "Is the tent gold?"])
    answer, asked = LibraryEngine._answer, list[int]()

    def short(self: LibraryEngine, batch: Any) -> None:
        asked.append(len(batch.rows))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("as a small card would")
        answer(self, batch)

    monkeypatch.setattr(LibraryEngine, "_answer", short)

    def ask(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    out = io.StringIO()
    chat(folder.root, [], ask=ask, out=out)
    assert out.getvalue().strip() and asked == [1, 1]
    assert "Memory ran out over the answer to " in capsys.readouterr().err


# Refused before anything is loaded or fetched


def test_a_prompt_longer_than_the_context_is_refused_before_training(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy is one that the schema allows; of the refused run there is no folder."""
    test = tmp_path / "long.json"
    for words, remedy in ((225, "Use at most generate.max_new_tokens="), (900, "Shorten the prompt, or leave it out")):
        rows = [{"id": "long", "conversations": [{"from": "human", "value": "red " * words}]}]
        test.write_text(json.dumps(rows))
        file = recipe_file({"data.test": str(test), "generate.max_new_tokens": 100})
        for command in ([str(file)], ["plan", str(file)]):
            assert main(command) == 2
            message = capsys.readouterr().err
            assert "prompt 'long' has" in message and remedy in message and "=0" not in message
    assert not (tmp_path / "runs").exists()


def test_a_hub_ids_context_is_known_before_its_weights_are_fetched(
    recipe_file: RecipeFactory, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[bool] = []

    def fetch(name: str, revision: str | None, allow: list[str], ignore: list[str], kind: str, weights: bool) -> Path:
        fetched.append(weights)
        return tiny

    monkeypatch.setattr(download, "_fetch", fetch)
    recipe = load_recipe(recipe_file({"model.name_or_path": "someone/tiny", "model.max_length": 4096}), [])
    with pytest.raises(InputError, match=r"model.max_length: 4096 .*has 256: use model.max_length=256"):
        run(recipe, "small.yaml")
    assert fetched and not any(fetched)


def test_target_modules_are_looked_at_before_the_weights(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    base = bases.save_base(tmp_path / "base", "phi3")
    (base / "model.safetensors").unlink()  # its absence is noticed later
    changes = {"model.name_or_path": str(base), **SMALL}
    file = recipe_file(changes | {"lora.target_modules": ["qkv_proj", "o_porj"]})
    with pytest.raises(InputError, match=r"'o_porj' is not a linear layer .*did you mean 'o_proj'.*qkv_proj"):
        made(file)
    with pytest.raises(InputError, match="holds no weights"):
        made(recipe_file(changes | {"lora.target_modules": ["qkv_proj", "down_proj"]}))
    with pytest.raises(InputError, match=r"v_porj.*did you mean 'v_proj'"):
        load_recipe(recipe_file({"lora.target_modules": ["q_proj", "v_porj"]}), [])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    base = bases.save_base(tmp_path / "base", "llama", vocab_size=300)
    with pytest.raises(InputError, match=r"holds the token \d+, and the base model knows 300 tokens"):
        made(recipe_file({"model.name_or_path": str(base)}))


def test_what_transformers_cannot_build_is_refused(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    base = bases.save_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "of_next_year"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"transformers cannot build .*'of_next_year'"):
        made(recipe_file({"model.name_or_path": str(base)}))


def test_sizes_that_four_bits_on_a_cpu_cannot_have_are_refused(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes packs 4-bit layers anew on some CPUs, and fails on inner sizes such as 96, after the training."""
    import bitsandbytes

    base = bases.save_base(tmp_path / "base", "llama")
    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    with pytest.raises(InputError, match=r"model.load_in_4bit: .*\(96 x 64\).*model.load_in_4bit=false"):
        made(recipe_file({"model.name_or_path": str(base)}))


# A base that moved


def test_a_base_that_moved_answers_where_the_adapters_check_vouches_for_it(
    recipe_file: RecipeFactory, tmp_path: Path, tiny: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny, old)
    _, folder = made(recipe_file({"model.name_or_path": str(old), "curriculum": {}}))
    first = folder.pred.read_bytes()
    old.rename(new)
    with pytest.raises(InputError):
        generate_again(folder.root, ["generate.max_new_tokens=5"])
    config = json.loads((new / "config.json").read_text()) | {"transformers_version": "9.0"}
    (new / "config.json").write_text(json.dumps(config))
    generate_again(folder.root, [f"model.name_or_path={new}"])
    assert folder.pred.read_bytes() == first
    assert any(f"the base was {new}" in text for text in folder.manifest()["notes"])
    other = bases.save_base(tmp_path / "other", "llama", intermediate_size=128)
    with pytest.raises(InputError, match=r"not what was trained|another base model"):
        generate_again(folder.root, [f"model.name_or_path={other}"])
    with pytest.raises(InputError, match=r"only generate.*model.name_or_path"):
        generate_again(folder.root, ["lora.r=2"])
