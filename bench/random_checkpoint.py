"""Write checkpoints of given shapes with random NF4 weights.

Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DRAWN = 1000  #: tokens whose embeddings are drawn
_STORED = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def write(folder: Path, config: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a base in fp16, and the tokenizer of a folder beside it; `config` is of a family with blocks of ours.

    One layer is drawn, and written as often as the base has layers; a thousand tokens' embeddings likewise.
    """
    from safetensors.torch import save_file

    from fast_ft.models.random_base import random_model

    folder.mkdir(parents=True)
    vocabulary = config["vocab_size"]
    drawn = {**config, "num_hidden_layers": 1, "vocab_size": min(_DRAWN, vocabulary)}
    model = random_model(drawn, "float16", r=1).unload()
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu()
        if name.startswith("model.layers.0."):
            for index in range(config["num_hidden_layers"]):
                tensors[name.replace(".0.", f".{index}.", 1)] = value.clone()
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = value.repeat(-(-vocabulary // len(value)), 1)[:vocabulary].contiguous()
        else:
            tensors[name] = value.clone()
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    architecture = {"architectures": [f"{config['model_type'].capitalize()}ForCausalLM"], "torch_dtype": "float16"}
    content = {**config, **architecture, **_IDS, "quantization_config": _STORED}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(_IDS), encoding="utf-8")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
