"""What is wrong with the adapter that a recipe asks for, by the recipe alone; a part of recipe/lint.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fast_ft.common.errors import nearest
from fast_ft.hub.families import LINEARS, TARGET_MODULES, has_llamas_layers
from fast_ft.recipe import lora_kinds
from fast_ft.recipe.schema import Recipe

Found = tuple[str, tuple[str, ...]]  #: a sentence, and the keys whose values it depends on

#: Linear layers of families without Llama's: Phi-3, GPT-NeoX, Phi, Falcon, StarCoder2.
OTHER_LINEARS = ("qkv_proj", "gate_up_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2",
                "c_fc", "c_proj")  # fmt: skip


def problems(recipe: Recipe) -> Iterator[Found]:
    """Find a LoRA that trains nothing, that is on no layer, or that the named way of training does not know."""
    model, lora = recipe.model, recipe.lora
    if lora.r == 0:
        yield "lora.r: rank 0 trains nothing; common are 8 to 64", ("lora.r",)
    if lora.lora_alpha == 0:
        yield "lora.lora_alpha: 0 switches the adapter off; common are r and twice r", ("lora.lora_alpha",)
    if lora.target_modules != "all-linear":
        yield from _targets(lora.target_modules, has_llamas_layers(model.name_or_path))
    if model.backend != "auto" and (kind := lora_kinds.unknown(model.backend, lora)):
        text = f"model.backend: {model.backend} does not know {kind.name} ({kind.key}); write auto, which takes a way"
        yield (f"{text} that does, or peft", ("model.backend", kind.key))
    if len(set(lora.modules_to_save)) < len(lora.modules_to_save):
        yield ("lora.modules_to_save: a module is named twice", ("lora.modules_to_save",))


def _targets(names: tuple[str, ...], known: bool | None) -> Iterator[Found]:
    """Find what is no linear layer of a block. PEFT takes a name's end too: self_attn.q_proj, layers.3.mlp.up_proj.

    `known`: whether the base has Llama's layers. Another base's layers are looked at before it is loaded
    (models/base_layers.py). Of a base whose files are not here (None), what may be such a layer is left to that.
    """
    if not names:
        yield ("lora.target_modules: the list is empty; all-linear takes all", ("lora.target_modules",))
    if known is False:
        return
    paths = [f".model.layers.0.{path}" for path in LINEARS]
    for name in dict.fromkeys(names):
        numberless = re.sub(r"(^|layers\.)[0-9]+\.", r"\g<1>0.", name)
        if known is None and name in OTHER_LINEARS:
            continue
        if not name or not any(path.endswith(f".{numberless}") for path in paths):
            hint = nearest(name, TARGET_MODULES)
            if name == "all-linear":
                hint = "; write lora.target_modules: all-linear, without a list"
            if name in ("lm_head", "embed_tokens"):
                hint = f"; lora.modules_to_save=[{name}] trains it whole"
            text = f"lora.target_modules: {name!r} is not a layer that a LoRA can be put on{hint}; there are"
            yield (f"{text} {', '.join(TARGET_MODULES)}", ("lora.target_modules",))
