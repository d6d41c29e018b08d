"""A base model's linear layers, by name and size: what a LoRA can be put on. No weights are needed, config.json does.

A family with blocks of ours has Llama's layers. Those of any other model are read off transformers' own model, built
without memory for its weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common import environment
from fast_ft.common.errors import InputError, nearest
from fast_ft.common.text_safety import escaped
from fast_ft.hub.families import LINEARS, FamilySpec
from fast_ft.hub.quantisation import HEAD, Quantisation
from fast_ft.models import lora_config
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def linear_layers(folder: Path, family: FamilySpec) -> dict[str, tuple[int, int]]:
    """Return {dotted name: (inputs, outputs)} of a base's linear layers, its head included.

    Raises:
        InputError: transformers has no language model of this model_type, or cannot build one from config.json.
    """
    shape = family.shape
    if family.general is None:
        sizes = dict(zip(LINEARS, shape.linear_shapes, strict=True))
        layers = range(shape.num_hidden_layers)
        named = {f"model.layers.{i}.{name}": size for i in layers for name, size in sizes.items()}
        return named | {"lm_head": (shape.hidden_size, shape.vocab_size)}
    return {
        name: (module.in_features, module.out_features)
        for name, module in _without_weights(folder, family).named_modules()
        if type(module).__name__ == "Linear"
    }


def counted(folder: Path, family: FamilySpec) -> FamilySpec:
    """Return a base's description with the linear layers that it really has, for the plan.

    Raises InputError as `linear_layers` does.
    """
    if family.general is None:
        return family
    own = {name: size for name, size in linear_layers(folder, family).items() if "." in name}  # the head has no dot
    stored = family.quantisation
    left = sum(a * b for name, (a, b) in own.items() if stored is not None and stored.leaves(name))
    return replace(family, shape=replace(family.shape, own_linears=tuple(own.values()), unquantised_weights=left))


def check(folder: Path, family: FamilySpec, lora: schema.Lora) -> None:
    """Check that a base on the general way has the recipe's target modules, and the modules that are saved whole.

    Of the other families the recipe's own check knows the layers.

    Raises:
        InputError: one is not, or transformers cannot build the model.
    """
    if family.general is None:
        return
    if lora.modules_to_save:
        there = dict(_without_weights(folder, family).named_modules())
        for name in lora.modules_to_save:
            if lora_config.WHOLE[name] not in there:
                raise InputError(f"lora.modules_to_save: this base has no {lora_config.WHOLE[name]}: write []")
        if HEAD in lora.modules_to_save and family.quantisation is not None and not family.quantisation.leaves(HEAD):
            raise InputError(
                "lora.modules_to_save: this base's head has 4 bits, so it cannot be trained whole: write "
                f"{[name for name in lora.modules_to_save if name != HEAD]}"
            )
    layers = linear_layers(folder, family)
    if not any("." in name for name in layers):
        raise InputError(
            f"the base model (model_type {escaped(family.model_type)!r}) has no linear layers that a LoRA can be put "
            "on: give another model.name_or_path."
        )
    if lora.target_modules == "all-linear":
        return
    for target in lora.target_modules:
        if not any(is_named(name, target) for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers} - {"lm_head"})
            raise InputError(
                f"lora.target_modules: {target!r} is not a linear layer of this base{nearest(target, ends)}; there are "
                f"{', '.join(ends)}"
            )


def check_4bit_on_cpu(folder: Path, family: FamilySpec) -> None:
    """Check that a base's layers have sizes in which bitsandbytes can hold 4-bit weights on this CPU.

    Where the CPU multiplies bfloat16, bitsandbytes packs such weights again at the first pass in evaluation mode, in
    blocks of 64 inputs and 32 outputs.

    Raises:
        InputError: a layer has other sizes.
    """
    with environment.without_compiler():
        import bitsandbytes

    if not bitsandbytes.functional.has_avx512bf16():
        return
    stored = family.quantisation or Quantisation()
    for name, (inputs, outputs) in linear_layers(folder, family).items():
        if not stored.leaves(name) and (inputs % 64 or outputs % 32):
            raise InputError(
                f"model.load_in_4bit: bitsandbytes cannot hold {name} ({inputs} x {outputs}) in 4 bits on this CPU, "
                "which takes multiples of 64 inputs and 32 outputs: use model.load_in_4bit=false"
            )


def is_named(layer: str, target: str) -> bool:
    """Return whether PEFT finds this layer, by its dotted name, under a name of target_modules."""
    return layer == target or layer.endswith(f".{target}")


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return a loaded model's decoder layers, in order, below a PEFT model or not, whatever the model calls them."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = core.base_model
    for name in ("layers", "h", "blocks"):
        if hasattr(inner, name):
            return list(getattr(inner, name))
    raise InputError(f"the base model's layers were not found in {type(inner).__name__}: give another base")


def _without_weights(folder: Path, family: FamilySpec) -> PreTrainedModel:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration from outside may fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"transformers cannot build the base model (model_type {escaped(family.model_type)!r}) from its "
            f"config.json: {escaped(lines[0][:200])}. Give another model.name_or_path, or a newer transformers."
        ) from None
