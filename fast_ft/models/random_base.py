"""A model of a given shape with random NF4 weights and a random LoRA, made in place: no checkpoint is read.

Speed and memory do not depend on the weights' values. The layout is that of a loaded model of transformers,
bitsandbytes and PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fast_ft.hub.families import TARGET_MODULES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def random_model(config: dict[str, Any], dtype: str, *, r: int = 16) -> PeftModel:
    """Return the model for a config.json's content, in evaluation mode, on the GPU if there is one."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind, device = getattr(torch, dtype), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    settings = transformers.LlamaConfig.from_dict(config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings).to(kind)
    _quantise(model, kind, device)
    for name, weight in list(model.named_parameters()):
        if weight.device.type == "meta":
            owner, _, last = name.rpartition(".")
            value = torch.ones(weight.shape) if "norm" in name else torch.randn(weight.shape, device=device) * 0.02
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(value.to(device, kind), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=list(TARGET_MODULES)))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, device=device) * (0.02 if "lora_A" in name else 0.002)
    return model.eval().requires_grad_(False)


def _quantise(module: torch.nn.Module, kind: torch.dtype, device: str) -> None:
    """Put a 4-bit layer of random weights in the place of each linear layer below `module` but the head."""
    import bitsandbytes as bnb
    import torch

    for name, child in list(module.named_children()):
        if not isinstance(child, torch.nn.Linear):
            _quantise(child, kind, device)
        elif name != "lm_head":
            drawn = torch.randn(child.out_features, child.in_features, device=device, dtype=kind) * 0.02
            packed, state = bnb.functional.quantize_4bit(drawn, quant_type="nf4", compress_statistics=True)
            layer = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=kind, quant_type="nf4", device="meta"
            )
            layer.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
            )
            layer.quant_state = state
            setattr(module, name, layer)
