"""A model of a given shape with random NF4 weights: made in place with a random LoRA, or written as a checkpoint.

Speed and memory do not depend on the weights' values. The layout is that of a loaded model of transformers,
bitsandbytes and PEFT. `python -m bench.random_base JOB.json` writes a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.hub.families import TARGET_MODULES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def random_model(config: Mapping[str, Any], dtype: str, *, r: int = 16) -> PeftModel:
    """Return the model for a config.json's content, in evaluation mode, on the GPU if there is one."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_base(config, dtype), LoraConfig(r=r, lora_alpha=r, target_modules=list(TARGET_MODULES)))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, device=weight.device) * (0.02 if "lora_A" in name else 0.002)
    return model.eval().requires_grad_(False)


def write(folder: Path, config: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a base in fp16 with NF4 weights, as bitsandbytes stores them, and the tokenizer of a folder beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _base(config, "float16").state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    stored = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    architecture = {"architectures": [f"{config['model_type'].capitalize()}ForCausalLM"], "torch_dtype": "float16"}
    content = {**config, **architecture, **ids, "quantization_config": stored}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def _base(config: Mapping[str, Any], dtype: str) -> Any:
    """Return a Llama-like model of random weights on the GPU if there is one, its linear layers in 4 bits."""
    import torch
    import transformers

    kind, device = getattr(torch, dtype), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    settings = transformers.LlamaConfig.from_dict({**config, "model_type": "llama"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings).to(kind)
    _quantise(model, kind, device)
    for name, weight in list(model.named_parameters()):
        if weight.device.type == "meta":
            owner, _, last = name.rpartition(".")
            value = torch.ones(weight.shape) if "norm" in name else torch.randn(weight.shape, device=device) * 0.02
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(value.to(device, kind), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)
    return model


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


def main() -> int:
    """Write the base of a job: base, config, tokenizer, out."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write(Path(job["base"]), job["config"], Path(job["tokenizer"]))
    Path(job["out"]).write_text(json.dumps({"base": job["base"]}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
