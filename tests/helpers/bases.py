"""Small random bases of many families, with the pocket tokenizer: what a user may bring."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.helpers.parts import POCKET

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.15,
}  # fmt: skip
WINDOW = 12  #: tokens; the rows of most tests are longer
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 48,
}  # fmt: skip

#: {name: (model_type, what it has beside SIZES)}; blocks and decoding of ours take these.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3.2": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 window": (
        "qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
}  # fmt: skip
#: As OWN; these go the general way.
GENERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3": ("phi3", {}),
    "phi3 long": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 48}),
    "granite": (
        "granite",
        {"logits_scaling": 8.0, "residual_multiplier": 0.2, "embedding_multiplier": 2.0, "attention_multiplier": 0.1},
    ),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}
ALL = OWN | GENERAL


def random_base(name: str, **changes: Any) -> Any:
    """Return a random model of ALL, its norms' weights drawn too, in evaluation mode."""
    import torch
    import transformers

    kind, own = ALL[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | own | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.uniform_(0.5, 1.5)
            elif "bias" in key:
                weight.normal_(std=0.2)
    return model


def save_base(folder: Path, name: str, **changes: Any) -> Path:
    """Write a random model of ALL with the pocket tokenizer."""
    random_base(name, **changes).save_pretrained(str(folder))
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def save_in_4_bits(folder: Path, source: Path, skipped: list[str] | None, **changes: Any) -> Path:
    """Write a base quantised by bitsandbytes. `skipped`: modules that stay in 16 bits; None: the head alone."""
    import torch
    import transformers

    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    stored = transformers.BitsAndBytesConfig(llm_int8_skip_modules=skipped, **given | changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source), quantization_config=stored, dtype=torch.bfloat16
    )
    model.save_pretrained(str(folder))
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
