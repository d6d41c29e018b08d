"""Models of a given shape with random weights: made in place in NF4 with a LoRA, or written as a base of a true shape.

Speed and memory do not depend on the weights' values. What is made in place has the layout of a loaded model of
transformers, bitsandbytes and PEFT. A folder is written for whole runs:

    python -m fast_ft.models.random_base qwen3-1.7b OUT TOKENIZER_FOLDER
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.hub.families import TARGET_MODULES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

#: The published shapes: Llama-3.2-1B, Qwen3-1.7B, Mistral-7B-v0.1 (with its window).
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-1.7b": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32_000,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "sliding_window": 4096,
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write the base that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fast_ft.models.random_base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a folder, whose tokenizer files are copied")
    options = parser.parse_args(arguments)
    write_base(options.out, SHAPES[options.shape], options.tokenizer)
    return 0


def write_base(folder: Path, shape: dict[str, Any], tokenizer: Path, **changes: Any) -> Path:
    """Write a base of this shape, with `changes` of it, in fp16 with random weights, and a tokenizer's files."""
    import torch
    import transformers

    torch.manual_seed(0)
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | shape | changes
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(str(folder))
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def random_model(config: dict[str, Any], dtype: str, *, r: int = 16) -> PeftModel:
    """Return the model for a config.json's content, in evaluation mode, on the GPU if there is one."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind, device = getattr(torch, dtype), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**{"model_type": "llama"} | config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings).to(kind)
    _quantise(model, kind, device)
    for name, weight in list(model.named_parameters()):
        if weight.device.type == "meta":
            owner, _, last = name.rpartition(".")
            value = torch.ones(weight.shape) if "norm" in name else torch.randn(weight.shape, device=device) * 0.02
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(value.to(device, kind), requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)
    with torch.device(device):  # PEFT draws its matrices before they are put on the base's device
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
                child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=kind,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
            )
            layer.quant_state = state
            setattr(module, name, layer)


if __name__ == "__main__":
    raise SystemExit(main())
