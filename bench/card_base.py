"""Random bases of an owner's ten minutes: one in the card's memory, and a part of it as a folder for any loader."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.atomic_files import write_json
from fast_ft.models import lora_files
from fast_ft.models.loaders.base import LoadedModel, compute_dtype
from fast_ft.models.random_base import random_model
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LORA = schema.Lora(r=16, lora_alpha=16)  #: of the adapter that `as_folder` writes
_POCKET = Path(__file__).parents[1] / "fast_ft" / "pocket" / "base"


def device() -> str:
    """Return cuda where torch sees a card, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the quickstart's tokenizer: the trainer wants one, and nothing is tokenised."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(_POCKET), local_files_only=True, trust_remote_code=False)


def in_memory(config: dict[str, Any], wanted: str, r: int) -> LoadedModel:
    """Return a random base with an adapter to train, made on the device that is here. `wanted`: its dtype, or auto."""
    dtype = compute_dtype(wanted, device())
    model = random_model(config, dtype, r=r)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    return LoadedModel(model, tokenizer, "peft", device(), dtype)


def as_folder(folder: Path, config: dict[str, Any], wanted: str) -> None:
    """Write folder/base, 4-bit as published bases are, and folder/adapter, whose B matrices are not zero."""
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    dtype = compute_dtype(wanted, device())
    model = random_model(config, dtype, r=LORA.r)
    adapter, base = folder / "adapter", folder / "base.part"
    adapter.mkdir(parents=True)
    lora_files.save(model, adapter, "random", "random")
    state = {name: value.detach().contiguous().cpu() for name, value in model.unload().state_dict().items()}
    base.mkdir()
    save_file(state, str(base / "model.safetensors"), metadata={"format": "pt"})
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    more = {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype, "quantization_config": quantised.to_dict()}
    write_json(base / "config.json", {"max_position_embeddings": 4096, **config, **more})
    for path in _POCKET.glob("*token*"):
        shutil.copy(path, base)
    shutil.copy(_POCKET / "generation_config.json", base)
    base.rename(folder / "base")  # a folder of that name is whole
