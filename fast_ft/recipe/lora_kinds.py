"""Which kinds of LoRA each way of training knows, by the recipe alone: no model and no torch is needed to say so."""

from __future__ import annotations

from typing import NamedTuple

from fast_ft.recipe import schema

#: What a way is called in a sentence.
TITLES = {"fused": "our own blocks", "unsloth": "Unsloth", "peft": "PEFT"}


class Kind(NamedTuple):
    """A kind of LoRA: the recipe's key that asks for it, and its name."""

    key: str
    name: str


def unknown(way: str, lora: schema.Lora) -> Kind | None:
    """Return what of a recipe's LoRA a way of training does not know, or None.

    Our own blocks know any choice of linear layers and either scale. Unsloth's functions draw dropout too. PEFT's own
    layers know all of it.
    """
    if way == "peft":
        return None
    if lora.use_dora:
        return Kind("lora.use_dora", "DoRA")
    if way == "unsloth" and lora.modules_to_save:
        return Kind("lora.modules_to_save", "modules that are trained whole")
    if way == "fused" and "embed_tokens" in lora.modules_to_save:
        return Kind("lora.modules_to_save", "embeddings that are trained")
    if way == "fused" and lora.lora_dropout > 0:
        return Kind("lora.lora_dropout", "dropout")
    return None
