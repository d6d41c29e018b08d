"""Small real parts that tests share: paths, models, our own rows, a recipe that runs on a CPU in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "fast_ft" / "pocket" / "base"  # a trained model, on which a loss means something
REAL = ROOT.parent / "shared" / "data"  # Alpaca's rows and Llama's tokenizer, which the project does not ship

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real rows: {REAL} is absent")

COLOURS = ["red", "blue", "green", "white", "black", "grey", "pink", "brown", "gold", "teal"]
THINGS = ["door", "boat", "hat", "cup", "lamp", "chair", "kite", "tent", "coat", "bell"]


def save_random_llama(folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2) -> Path:
    """Write a random Llama with the pocket tokenizer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=256,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def answered(prompts: Path, text: str) -> str:
    """Return the JSON of a file's prompts, each with `text` as its reference answer."""
    rows = json.loads(prompts.read_text(encoding="utf-8"))
    return json.dumps(
        [row | {"conversations": [*row["conversations"], {"from": "gpt", "value": text}]} for row in rows]
    )


def write_recipe(
    folder: Path, base: Path, train: Path, test: Path, changes: dict[str, Any] | None = None, name: str = "small.yaml"
) -> Path:
    """Write a small CPU recipe, changed by dotted keys, and return its path."""
    content: dict[str, Any] = {
        "output_dir": str(folder / "runs" / "{recipe}-{digest8}"),
        "model": {"name_or_path": str(base), "max_length": 128, "backend": "peft"},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(train), "test": str(test)},
        "select": {"take": 16, "rank_by": {"score": 1.0}},
        "curriculum": {
            "stages": [
                {"name": "easy", "upto": 0.5, "num_train_epochs": 1},
                {"name": "all", "upto": 1.0, "num_train_epochs": 1},
            ]
        },
        "train": {
            "effective_batch_size": 4, "per_device_train_batch_size": 4, "warmup_steps": 1, "optim": "adamw_torch",
            "learning_rate": 0.01, "gradient_checkpointing": False,
        },
        "generate": {"do_sample": False, "max_new_tokens": 6, "batch_size": 3},
    }  # fmt: skip
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    file = folder / name
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    return file


RecipeFactory = Callable[..., Path]
