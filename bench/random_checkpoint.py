"""Write checkpoints of given shapes with random NF4 weights: `python -m bench.random_checkpoint JOB.json`.

Speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_STORED = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def write(folder: Path, config: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a base in fp16, and the tokenizer of a folder beside it; `config` is of a family with blocks of ours."""
    from safetensors.torch import save_file

    from fast_ft.models.random_base import random_model

    folder.mkdir(parents=True)
    model = random_model(dict(config), "float16", r=1).unload()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    architecture = {"architectures": [f"{config['model_type'].capitalize()}ForCausalLM"], "torch_dtype": "float16"}
    content = {**config, **architecture, **_IDS, "quantization_config": _STORED}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(_IDS), encoding="utf-8")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> int:
    """Write the bases of a job: bases ({folder: config}), tokenizer, out."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for folder, config in job["bases"].items():
        write(Path(folder), config, Path(job["tokenizer"]))
    Path(job["out"]).write_text(json.dumps({"bases": list(job["bases"])}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
