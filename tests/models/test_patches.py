"""What is changed on a loaded model is taken back: in any order of owners, libraries' own changes included."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch import nn

from fast_ft.models.activation_checkpointing import recompute
from fast_ft.models.fused_block import block
from fast_ft.models.loaders import choose
from fast_ft.models.patches import ModelPatches
from fast_ft.recipe import schema


def test_changes_are_taken_back_newest_first_and_once() -> None:
    layer, patches = nn.Linear(2, 2), ModelPatches()
    own = layer.forward
    patches.replace(layer, "forward", lambda x: x)
    patches.replace(layer, "forward", lambda x: 2 * x)
    calls = []
    patches.hook(layer.register_forward_hook(lambda *_: calls.append(1)))
    assert layer(torch.ones(2)).tolist() == [2, 2] and calls == [1]
    patches.undo()
    assert "forward" not in layer.__dict__ and layer.forward == own
    layer(torch.ones(2))
    assert calls == [1]
    layer.forward = lambda x: 3 * x
    patches.undo()
    assert layer(torch.ones(2)).tolist() == [3, 3], "what was taken back is forgotten"


def test_a_group_is_taken_back_alone_or_with_all() -> None:
    layer, patches = nn.Linear(2, 2), ModelPatches()
    patches.replace(layer, "forward", lambda x: x)
    for _ in range(2):
        group = patches.group()
        group.replace(layer, "forward", lambda x: 2 * x)
        assert layer(torch.ones(2)).tolist() == [2, 2]
        group.undo()
        assert layer(torch.ones(2)).tolist() == [1, 1]
    patches.group().replace(layer, "note", "of a trial")
    patches.undo()
    assert not {"forward", "note"} & layer.__dict__.keys()


def test_what_libraries_put_in_place_is_taken_back_too() -> None:
    model, patches = nn.Linear(2, 2), ModelPatches()
    data = model.weight.data
    patches.remember(model, "forward", "peft_config")
    patches.keep(model.weight)
    model.forward, model.peft_config = (lambda x: x), {}
    model.weight.data = data.bfloat16()
    patches.undo()
    assert model.weight.dtype == torch.float32 and model.weight.data_ptr() == data.data_ptr()
    assert not {"forward", "peft_config"} & model.__dict__.keys()


def test_scales_that_change_in_place_are_put_back() -> None:
    data, state = torch.arange(4), types.SimpleNamespace(packed=False)
    layer = types.SimpleNamespace(weight=types.SimpleNamespace(data=data, quant_state=state), quant_state=state)
    patches = ModelPatches()
    patches.keep_4bit(layer)
    state.packed, layer.weight.data = True, torch.arange(9)
    patches.undo()
    assert layer.weight.data is data and layer.quant_state is layer.weight.quant_state
    assert layer.weight.quant_state.packed is False


def test_a_models_layers_are_their_own_again(tiny: Path) -> None:
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64)
    loaded = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
    layers = loaded.model.get_base_model().model.layers
    assert block.install(loaded.model, loaded.patches) is None
    blocks = [layer.forward for layer in layers]
    recomputed = loaded.patches.group()
    recompute(loaded.model, 1, recomputed)
    assert layers[0].forward != blocks[0] and layers[1].forward == blocks[1]
    recomputed.undo()
    assert [layer.forward for layer in layers] == blocks
    loaded.patches.undo()
    assert not [layer for layer in layers if "forward" in layer.__dict__]
    base = loaded.model.unload()
    assert "peft_config" not in base.__dict__
