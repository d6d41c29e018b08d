"""Base model and adapter: load, add LoRA, save, load again. Two ways, one recipe.

PeftBackend uses transformers, PEFT and bitsandbytes alone; it runs on a CPU too, and is the yardstick. FusedBackend is
the same with our own decoder blocks in training (block/), for NVIDIA GPUs: fastest, and loaded in half the time.
UnslothBackend uses Unsloth's patched kernels, for NVIDIA GPUs too.

Importing unsloth patches transformers and trl. So a backend is made before either is imported, and unsloth is named
in this module only.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fast_ft import adapter_file, attention, environment, hub, recipe
from fast_ft.block import block
from fast_ft.errors import InputError
from fast_ft.shape import ModelShape

#: All linear layers of a Llama block, by the names that Unsloth wants spelled out.
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Loaded:
    """A model on its device, and what is known of it.

    `model` is a PeftModel; `tokenizer` is transformers' own, for whoever loads the adapter later (ids come from
    template.py). `dtype` is what the base computes in. `notes` are sentences for the manifest.
    """

    model: Any
    tokenizer: Any
    backend: str
    device: str
    dtype: str
    notes: list[str] = field(default_factory=list)

    def free(self) -> None:
        """Give the model's memory back, so that the next one fits where this one was."""
        self.model = None
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


class Backend(Protocol):
    """Loads a base model with an adapter. `name` is "unsloth" or "peft"."""

    name: str
    notes: list[str]

    def for_training(self, adapter: Path | None = None) -> Loaded:
        """Return the base model with a LoRA adapter to train: a new one, or the one in a folder."""

    def for_generation(self, adapter: Path) -> Loaded:
        """Return a fresh base model with the adapter in a folder, ready to answer."""


#: Said where a recipe that means Unsloth is trained by several processes.
ALONE_ONLY = "Unsloth trains in one process only: several train through PEFT, more slowly each."


def make_backend(
    model: recipe.Model, lora: recipe.Lora, *, seed: int, name: str | None = None, world_size: int = 1
) -> Backend:
    """Return the backend that the recipe asks for; or `name`, the one that an adapter was trained with.

    auto is recipe.card_backend where there is an NVIDIA GPU. Where our blocks do not know the model or the card, it is
    Unsloth, and where that does not import or several processes train, PEFT; the run says so.
    """
    environment.expand_segments()
    # Both read these at import time: no telemetry, no tokenizer threads forked under a data loader.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a CPU kernel that it would fetch from the hub
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it repeats one hint with each batch
    arguments = (model, lora, seed)
    wanted = name or model.backend
    if wanted == "peft":
        return PeftBackend(*arguments)
    import torch

    if not torch.cuda.is_available():
        if wanted == "auto" or name == "fused":  # which answers as peft does
            return PeftBackend(*arguments)
        raise InputError(
            f"model.backend: {wanted!r} needs an NVIDIA GPU, and torch sees none. Use model.backend=peft, or "
            "check the driver with nvidia-smi."
        )
    notes = []
    if (name or recipe.card_backend(model, lora)) == "fused":
        fused = FusedBackend(*arguments)
        problem = fused.problem() if name is None else None
        if problem is None:
            return fused
        if wanted == "fused":
            raise InputError(f"model.backend: 'fused' cannot train this: {problem}. Use model.backend=auto.")
        notes = [f"Not trained through our own blocks: {problem}."]
    if world_size > 1:
        peft_backend = PeftBackend(*arguments)
        peft_backend.notes += [*notes, ALONE_ONLY]
        return peft_backend
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if wanted == "unsloth":
            raise InputError(
                f"model.backend: 'unsloth' does not import ({reason}). Install the versions in requirements.txt, "
                "or use model.backend=peft."
            ) from error
        backend: Backend = PeftBackend(*arguments)
        notes.append(f"Unsloth does not import ({reason}): the run went through PEFT, more slowly.")
    else:
        backend = UnslothBackend(*arguments)
    backend.notes += notes
    return backend


class _Base:
    """What both backends share: the base model's folder, its type, and the adapter's arguments."""

    name = ""

    def __init__(self, model: recipe.Model, lora: recipe.Lora, seed: int) -> None:
        import torch

        self.section, self.lora, self.seed = model, lora, seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = _dtype(model.dtype, self.device)
        self.notes: list[str] = []
        self.folder = hub.model_folder(model.name_or_path, model.revision)

    def _loaded(self, model: Any) -> Loaded:
        import transformers

        source = self.section.tokenizer or self.section.name_or_path
        folder = hub.tokenizer_folder(source, self.section.revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, padding_side="right"
        )
        if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        return Loaded(model, tokenizer, self.name, self.device, self.dtype, self.notes)


class PeftBackend(_Base):
    """transformers, PEFT and bitsandbytes, unpatched; on a CPU or an NVIDIA GPU."""

    name = "peft"

    def for_training(self, adapter: Path | None = None) -> Loaded:
        import peft

        base = self._base_model()
        if adapter is not None:
            return self._loaded(peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True))
        return self._loaded(self.with_adapter(base))

    def with_adapter(self, base: Any) -> Any:
        """Return the base with a new adapter, drawn from the seed."""
        import peft
        import torch

        torch.manual_seed(self.seed)  # LoRA's A matrices are drawn here
        targets = self.lora.target_modules
        config = peft.LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.lora_alpha,
            lora_dropout=self.lora.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            bias="none",
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(base, config)

    def for_generation(self, adapter: Path) -> Loaded:
        import peft

        adapter_file.check(adapter, self.folder)
        base = self._base_model()
        base.config.use_cache = True
        return self._loaded(peft.PeftModel.from_pretrained(base, str(adapter)).eval())

    def _base_model(self) -> Any:
        import torch
        import transformers

        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None) is not None
        dtype = getattr(torch, self.dtype)
        extra: dict[str, Any] = {}
        if self.section.load_in_4bit and not quantised:
            extra["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(self.folder),
            config=config,
            dtype=dtype,
            device_map={"": self.device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **extra,
        )
        for module in model.modules():
            if hasattr(module, "compute_dtype"):  # a stored checkpoint may ask for bf16, which a T4 has not
                module.compute_dtype = dtype
        return model


class FusedBackend(PeftBackend):
    """PeftBackend, its layers trained through our own blocks; NVIDIA GPUs only."""

    name = "fused"

    def problem(self) -> str | None:
        """Return why our blocks cannot train this model on this card, or None. Their kernels are compiled for it."""
        import torch

        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        like = torch.empty(1, dtype=getattr(torch, self.dtype), device=self.device)
        return block.unknown(config) or block.check(like, ModelShape.from_config(config))

    def for_training(self, adapter: Path | None = None) -> Loaded:
        loaded = super().for_training(adapter)
        if adapter is not None:
            self._with_blocks(loaded.model)
        return loaded

    def with_adapter(self, base: Any) -> Any:
        return self._with_blocks(super().with_adapter(base))

    def _with_blocks(self, model: Any) -> Any:
        if reason := block.install(model):
            self.notes.append(f"{reason}: trained through PEFT's own layers, more slowly and in more memory.")
        return model


class UnslothBackend(_Base):
    """Unsloth's FastLanguageModel: patched kernels, its own checkpointing; NVIDIA GPUs only."""

    name = "unsloth"

    def for_training(self, adapter: Path | None = None) -> Loaded:
        model = self._base_model(self.folder)
        _attend_row_by_row()
        model = self.with_adapter(model)
        if adapter is not None:
            adapter_file.load(model, adapter / "adapter_model.safetensors")
        return self._loaded(model)

    def with_adapter(self, base: Any) -> Any:
        """Return the base with a new adapter, drawn from the seed, and Unsloth's kernels put in."""
        from unsloth import FastLanguageModel

        targets = LLAMA_LINEAR if self.lora.target_modules == "all-linear" else self.lora.target_modules
        model = FastLanguageModel.get_peft_model(
            base,
            r=self.lora.r,
            lora_alpha=self.lora.lora_alpha,
            lora_dropout=self.lora.lora_dropout,
            target_modules=list(targets),
            bias="none",
            use_gradient_checkpointing=False,  # ours: recompute.py
            random_state=self.seed,
        )
        core = model.get_base_model().model
        core._has_no_labels = False  # else its forward takes labels' absence for inference
        core._unsloth_allow_packed_overlength = True  # else it cuts a pass at max_length, whatever the rows' lengths
        return model

    def for_generation(self, adapter: Path) -> Loaded:
        from peft import PeftModel
        from unsloth import FastLanguageModel

        adapter_file.check(adapter, self.folder)
        # Unsloth's own loader takes the base from the name inside adapter_config.json; the recipe's is the one meant.
        model = PeftModel.from_pretrained(self._base_model(self.folder), str(adapter))
        FastLanguageModel.for_inference(model)
        return self._loaded(model)

    def _base_model(self, folder: Path) -> Any:
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=self.section.max_length,
            dtype=getattr(torch, self.dtype),
            load_in_4bit=self.section.load_in_4bit,
            trust_remote_code=False,
            use_exact_model_name=True,  # never another repository that Unsloth knows by this name
        )
        return model


def _attend_row_by_row() -> None:
    """Let Unsloth's attention keep to the rows of a pass, while one of ours runs (attention.over)."""
    import importlib

    for name in ("llama", "mistral"):  # the others take llama's
        module: Any = importlib.import_module(f"unsloth.models.{name}")
        theirs = module.run_attention
        if getattr(theirs, "by_row", False):
            continue

        def run_attention(*, Q: Any, K: Any, V: Any, theirs: Any = theirs, **values: Any) -> Any:
            rows = attention.current()
            return theirs(Q=Q, K=K, V=V, **values) if rows is None else attention.attend(Q, K, V, rows)

        run_attention.by_row = True  # type: ignore[attr-defined]
        module.run_attention = run_attention


def _dtype(wanted: str, device: str) -> str:
    """auto: bfloat16 from compute capability 8.0 on, for torch claims it for a T4 too; float32 on a CPU."""
    import torch

    if wanted != "auto":
        if wanted == "bfloat16" and device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
            raise InputError(
                f"model.dtype: 'bfloat16' needs compute capability 8.0, and {torch.cuda.get_device_name()} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}. Use float16 or auto."
            )
        return wanted
    if device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
