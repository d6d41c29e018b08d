"""What our blocks do not know: of a base model's family, and of a loaded model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fast_ft.hub.families import LINEARS, FamilySpec
from fast_ft.models.fused_block.linear_group import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unknown(family: FamilySpec) -> str | None:
    """Return what of a base model a Block does not know, or None."""
    size = family.shape.head_dim
    if family.general is not None:
        return family.general
    return None if size & (size - 1) == 0 else f"a head's dimension is {size}, no power of two"


def in_layers(core: PreTrainedModel) -> str | None:
    """Return what of a loaded model's layers a Block does not know, or None."""
    size = core.get_input_embeddings().weight.element_size()
    named = ((path.split("."), layer) for layer in core.model.layers for path in LINEARS)
    found = (_in_linear(name, getattr(getattr(layer, part), name), size) for (part, name), layer in named)
    return next((reason for reason in found if reason is not None), None)


def _in_linear(name: str, module: Any, size: int) -> str | None:
    """Return what of a linear layer a Block does not know, or None. `size`: bytes of a number of the embeddings."""
    if hasattr(module, "lora_A"):
        if list(module.active_adapters) != ["default"]:
            return f"{name} has several adapters"
        if type(module.lora_dropout["default"]).__name__ != "Identity":
            return "the LoRA has dropout"
        if module.use_dora.get("default") or module.lora_bias.get("default"):
            return "the LoRA is of another kind"
    weight = base_of(module).weight
    state = getattr(weight, "quant_state", None)
    if state is not None and not (weight.is_cuda and state.quant_type == "nf4" and state.blocksize == 64):
        return "the 4-bit weights are not NF4 in blocks of 64 on a card"
    if state is not None and size != 2:
        return "4-bit weights become 16-bit ones here"
    if state is None and not weight.is_floating_point():
        return f"the weights are {weight.dtype}"
    return None
