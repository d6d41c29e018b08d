"""LoRA as users know it: each kind trains, is saved in PEFT's form, is checked when it is loaded, and answers as PEFT.

Plain PEFT reads what was saved, and its own `generate` gives the greedy answers of pred.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fast_ft.common.errors import InputError
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.data.prepare import prepare
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.models import adapter_check, lora_files
from fast_ft.models.fused_block import block
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.pipeline.preview import preview
from fast_ft.pipeline.run import run
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from fast_ft.train import checkpoints
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape, lay_out
from fast_ft.train.optimizer import FlatWeights
from tests.helpers.parts import POCKET, RecipeFactory

KINDS: dict[str, dict[str, Any]] = {
    "subset": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
}


def changes(kind: str) -> dict[str, Any]:
    return {"model.load_in_4bit": False, **{f"lora.{key}": value for key, value in KINDS[kind].items()}}


def peft_answers(base: Path, adapter: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Return greedy answers of transformers and PEFT alone, prompt by prompt."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    answers = []
    for ids in prompts:
        made = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        answers.append(made[0, len(ids) :].tolist())
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_lora_works_to_the_end(kind: str, recipe_file: RecipeFactory, tiny: Path) -> None:
    path = recipe_file(changes(kind) | {"train.learning_rate": 0.05})
    recipe = load_recipe(path)
    folder = run(recipe, path)
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    wanted = KINDS[kind]
    assert config["use_rslora"] is wanted.get("use_rslora", False)
    assert config["use_dora"] is wanted.get("use_dora", False)
    assert sorted(config["modules_to_save"] or []) == wanted.get("modules_to_save", [])
    assert config["lora_dropout"] == wanted.get("lora_dropout", 0.0)
    if "target_modules" in wanted:
        assert sorted(config["target_modules"]) == sorted(wanted["target_modules"])
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = checkpoints.newest(folder.checkpoints)
    assert checkpoint is not None
    saved = checkpoint / "adapter.safetensors"
    assert lora_files.misfit(saved, tiny, recipe.lora) is None, "a forced resume may go on from its own kind"
    assert lora_files.misfit(saved, tiny, recipe.lora.model_copy(update={"r": 8})) is not None
    prepared = prepare(recipe)
    ours = json.loads(folder.pred.read_text())
    theirs = peft_answers(tiny, folder.adapter, prepared.prompt_ids, recipe.generate.max_new_tokens)
    assert [entry["output"][0] for entry in ours.values()] == [prepared.encoder.decode(ids) for ids in theirs]


def rows() -> list[EncodedRow]:
    draw, made = torch.Generator().manual_seed(0), []
    for index, length in enumerate((5, 17, 9)):
        ids = torch.randint(300, 2000, (length,), generator=draw).tolist()
        made.append(EncodedRow(f"r{index}", ids, [IGNORE_INDEX] * 2 + ids[2:]))
    return made


def loader(base: Path, lora: dict[str, Any], *, four_bits: bool = False) -> Any:
    section = schema.Model(name_or_path=str(base), load_in_4bit=four_bits, max_length=64)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in lora.items()}
    return choose.make_loader(section, schema.Lora(r=4, lora_alpha=12, **settings), seed=1, name="peft")


def stirred(made: LoadedModel) -> LoadedModel:
    """Give the adapter other weights than its first ones, whose B is zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    return made


def gradients(made: LoadedModel) -> tuple[float, dict[str, Tensor]]:
    shape = MicroBatchShape(places=3, longest=17, pad_id=0)
    passes = Passes(made, FlatWeights(made.model), TrainPlan(3), shape)
    made.model.train()
    passes.begin(25, None)
    loss = passes(lay_out(rows(), tokens=32, places=3, pad_id=0), seed=1)
    passes.close()
    return loss.item(), {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


def autograds(made: LoadedModel) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the model's own forward pass, row by row, with transformers' logits."""
    made.model.zero_grad()
    made.model.train()
    total = torch.zeros(())
    for row in rows():
        logits = made.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    (total / 25).backward()
    return (total / 25).item(), {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["subset", "rslora", "dora", "head", "both"])
def test_loss_and_gradients_are_transformers_own(kind: str, tiny: Path) -> None:
    made = stirred(loader(tiny, KINDS[kind]).for_training())
    loss, expected = autograds(made)
    ours, found = gradients(made)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["o_proj"], ["up_proj", "k_proj"], ["layers.1.mlp.down_proj"], "all-linear"]
)
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_own_blocks_take_any_choice_of_layers(targets: Any, saved: list[str], tiny: Path) -> None:
    lora = {"target_modules": targets, "modules_to_save": saved, "use_rslora": True}
    made = stirred(loader(tiny, lora).for_training())
    loss, expected = autograds(made)
    assert block.install(made.model, made.patches) is None
    ours, found = gradients(made)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("four_bits", [False, True])
def test_decoding_sizes_doras_outputs_as_peft_does(four_bits: bool, tmp_path: Path) -> None:
    """Biases, which DoRA leaves as they are, too."""
    import transformers

    torch.manual_seed(2)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=2048,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name:
                weight.normal_()
    model.save_pretrained(tmp_path)
    for file in POCKET.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lora = {"use_dora": True, "target_modules": ["q_proj", "v_proj", "gate_proj"]}
    made = stirred(loader(tmp_path, lora, four_bits=four_bits).for_training())
    made.model.eval()
    layer = made.model.get_base_model().model.layers[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attn, mlp = layer.self_attn, layer.mlp
        expected_qkv = torch.cat([module(x) for module in (attn.q_proj, attn.k_proj, attn.v_proj)], dim=1)
        expected_mlp = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=1)
        _, qkv, _, _, gate_up, _ = FusedModel(made.model).layers[0]
        torch.testing.assert_close(qkv(x), expected_qkv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gate_up(x), expected_mlp, rtol=1e-4, atol=1e-4)
        with made.model.disable_adapter():
            plain = FusedModel(made.model).layers[0][1](x)
            bases = [module.base_layer if hasattr(module, "base_layer") else module
                     for module in (attn.q_proj, attn.k_proj, attn.v_proj)]  # fmt: skip
            torch.testing.assert_close(plain, torch.cat([base(x) for base in bases], dim=1), rtol=1e-5, atol=1e-5)


def test_modules_that_are_trained_whole_are_in_fp32_between_16_bit_layers(tiny: Path) -> None:
    """Gradients and the optimizer need fp32; passes, the adapter's check and decoding go through them all the same."""
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64, dtype="bfloat16")
    lora = schema.Lora(r=4, modules_to_save=("embed_tokens", "lm_head"))
    made = choose.make_loader(section, lora, seed=1, name="peft").for_training()
    _, found = gradients(made)
    core = made.model.get_base_model()
    assert core.lm_head.weight.dtype == core.model.embed_tokens.weight.dtype == torch.float32
    assert core.model.norm.weight.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for name, gradient in found.items()
               if "modules_to_save" in name or "lora_B" in name)  # fmt: skip
    made.model.eval()
    ids = rows()[1].input_ids
    (values,) = adapter_check.log_probabilities(made.model, [ids], [3], 0)
    assert len(values) == len(ids) - 3
    with torch.no_grad():
        model = FusedModel(made.model)
        attend = lambda layer, qkv, rope, first: qkv[:, : model.heads * model.head_dim]  # noqa: E731
        hidden = model.forward(torch.tensor(ids), torch.arange(len(ids)), attend)
    assert model.dtype == torch.bfloat16 and model.logits(hidden).dtype == torch.float32


def test_training_starts_from_an_adapter_that_is_there(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    first_path = recipe_file({"model.load_in_4bit": False}, name="first.yaml")
    first = run(load_recipe(first_path), first_path, until="adapter")
    path = recipe_file({"model.load_in_4bit": False, "model.adapter": str(first.adapter)}, name="second.yaml")
    second = run(load_recipe(path), path)
    lines = {folder: [json.loads(line) for line in folder.log.read_text().splitlines()] for folder in (first, second)}
    assert lines[second][0]["loss"] < lines[first][0]["loss"] - 0.01
    digest = first.manifest()["digests"]["adapter"]
    assert second.manifest()["starts_from"] == {"adapter": str(first.adapter), "sha256": digest}
    assert lora_files.check(second.adapter, Path(load_recipe(path).model.name_or_path)) is None


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"lora.r": 2}, "lora.r=4"),
        ({"lora.use_rslora": True}, "lora.use_rslora=false"),
        ({"lora.use_dora": True}, "lora.use_dora=false"),
        ({"lora.target_modules": ["q_proj"]}, "lora.target_modules=all-linear"),
        ({"lora.modules_to_save": ["lm_head"]}, r"lora.modules_to_save=\[\]"),
        ({"model.adapter": "/nowhere"}, "no adapter here"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_loading(
    changed: dict[str, Any], remedy: str, recipe_file: RecipeFactory, tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    made = loader(tiny, {}).for_training().model
    made.peft_config["default"].lora_alpha = 8
    lora_files.save(made, adapter, "base", "")
    path = recipe_file({"model.load_in_4bit": False, "model.adapter": str(adapter)} | changed)
    monkeypatch.setattr(
        "fast_ft.models.loaders.peft.PeftLoader._base_model", lambda *_: pytest.fail("the base was loaded")
    )
    with pytest.raises(InputError, match=remedy):
        run(load_recipe(path), path)


def test_a_tied_base_trains_neither_its_embeddings_nor_its_head_alone(recipe_file: RecipeFactory, tiny: Path) -> None:
    path = recipe_file({"lora.modules_to_save": ["lm_head"]})
    recipe = load_recipe(path)
    base = path.parent / "tied"
    base.mkdir()
    for file in tiny.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tied = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(base)})})
    with pytest.raises(InputError, match=r"lora\.modules_to_save: this base has one matrix"):
        run(tied, path)


def test_a_sweep_gives_the_base_its_own_head_back(tiny: Path) -> None:
    """PEFT's `unload` keeps the trained copy, so that the next trial would start from it."""
    maker = loader(tiny, {"modules_to_save": ["embed_tokens", "lm_head"]})
    made = maker.for_training()
    core = made.model.get_base_model()
    own = [core.lm_head.original_module.weight.clone(), core.model.embed_tokens.original_module.weight.clone()]
    stirred(made)
    lora_files.put_whole_modules_back(made.model)
    base = made.model.unload()
    for weight, before in zip((base.lm_head.weight, base.model.embed_tokens.weight), own, strict=True):
        assert weight.equal(before) and type(base.lm_head).__name__ == "Linear"


def test_a_kind_and_its_resumption_are_one(recipe_file: RecipeFactory) -> None:
    """Stopped after three steps and gone on with: the same adapter to the last bit, DoRA's sizes and a head too."""
    lora = {"lora.use_dora": True, "lora.modules_to_save": ["lm_head"], "model.load_in_4bit": False, "data.test": None}
    whole_path, parts_path = recipe_file(lora, name="whole.yaml"), recipe_file(lora, name="parts.yaml")
    whole = run(load_recipe(whole_path), whole_path)
    preview(load_recipe(parts_path), parts_path, 3)
    parts: RunDir = run(load_recipe(parts_path), parts_path)
    names = [folder.manifest()["digests"]["adapter"] for folder in (whole, parts)]
    assert names[0] == names[1]
