"""Unsloth's patched kernels. Importing unsloth patches transformers and trl, so it comes before either."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import out_of_memory
from fast_ft.hub.families import TARGET_MODULES
from fast_ft.models import lora_files, packed_attention
from fast_ft.models.loaders.base import LoadedModel, LoaderBase, draw_no_bars
from fast_ft.models.patches import ModelPatches

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


#: Unsloth's functions that a decoder layer runs through, with what of the layer each computes. Batching, the layout of
#: attention (`_attend_row_by_row`), recomputed layers, CUDA graphs and the loss are ours.
FUNCTIONS = {
    "q, k, v with LoRA": "unsloth.kernels.fast_lora.apply_lora_qkv",
    "o with LoRA": "unsloth.kernels.fast_lora.apply_lora_o",
    "MLP with LoRA": "unsloth.kernels.fast_lora.apply_lora_mlp_swiglu",
    "norms": "unsloth.kernels.rms_layernorm.fast_rms_layernorm",
    "rope": "unsloth.kernels.rope_embedding.fast_rope_embedding",
}

#: Held while unsloth is imported, so that an import that fails is tried once, whichever thread asks.
_importing = threading.Lock()


def import_problem() -> str | None:
    """Import unsloth; return why that cannot be, as "ErrorType: its first line", or None. Waits for `begin_import`."""
    with _importing:
        return _import_problem()


def begin_import() -> None:
    """Import unsloth in a thread, which takes half a minute: meanwhile rows can be read and encoded."""
    threading.Thread(target=import_problem, name="import unsloth").start()


@functools.cache
def _import_problem() -> str | None:
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def not_through_unsloth(model: PeftModel) -> str | None:
    """Return which parts of a model's layers do not run through Unsloth's functions, in a sentence, or None.

    Unsloth leaves a part to PEFT where a layer of it has no LoRA, or has a bias.
    """
    layers = list(model.get_base_model().model.layers)
    left: dict[str, int] = {}
    for layer in layers:
        runs = {
            "q, k, v with LoRA": getattr(layer.self_attn, "apply_qkv", None),
            "o with LoRA": getattr(layer.self_attn, "apply_o", None),
            "MLP with LoRA": layer.mlp.forward,
        }
        for part, function in runs.items():
            if name_of(function) != FUNCTIONS[part]:
                left[part] = left.get(part, 0) + 1
    if not left:
        return None
    counts = "; ".join(f"{part} of {count}" for part, count in left.items())
    return f"of {len(layers)} layers, these run through PEFT and not through Unsloth's functions: {counts}"


def name_of(function: Any) -> str:
    """Return where a function was defined, as module.name; what a method or a partial call holds is looked at."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


class UnslothLoader(LoaderBase):
    """Unsloth's FastLanguageModel: patched kernels; NVIDIA GPUs only. `import_problem` comes first."""

    name = "unsloth"

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train: a new one, or the one in a folder."""
        base, patches = self._base_model(self.folder), ModelPatches()
        _attend_row_by_row()
        model = self.with_adapter(base, patches)
        if adapter is not None:
            lora_files.load(model, adapter / "adapter_model.safetensors")
        return self._loaded(model, patches)

    def with_adapter(self, base: PreTrainedModel, patches: ModelPatches) -> PeftModel:
        """Return the base with a new adapter, drawn from the seed, and Unsloth's kernels put in."""
        from unsloth import FastLanguageModel

        patches.remember(base, "peft_config", "_hf_peft_config_loaded")  # PEFT warns where a second adapter finds them
        # Unsloth wants the names spelled out
        targets = TARGET_MODULES if self.lora.target_modules == "all-linear" else self.lora.target_modules
        model = FastLanguageModel.get_peft_model(
            base,
            r=self.lora.r,
            lora_alpha=self.lora.lora_alpha,
            lora_dropout=self.lora.lora_dropout,
            target_modules=list(targets),
            use_rslora=self.lora.use_rslora,
            bias="none",
            use_gradient_checkpointing=False,  # ours: models/activation_checkpointing.py
            random_state=self.seed,
        )
        core = model.get_base_model().model
        patches.replace(core, "_has_no_labels", False)  # else its forward takes labels' absence for inference
        # else it cuts a pass at max_length, whatever the rows' lengths
        patches.replace(core, "_unsloth_allow_packed_overlength", True)
        if (left := not_through_unsloth(model)) and left not in self.notes:
            self.notes.append(left)
        return model

    def for_generation(self, adapter: Path) -> LoadedModel:
        """Return a fresh base model with the adapter in a folder, ready to answer.

        Raises:
            InputError: the folder holds no adapter, or one that does not fit the base model.
        """
        from peft import PeftModel
        from unsloth import FastLanguageModel

        lora_files.check(adapter, self.folder)
        # Unsloth's own loader takes the base from the name inside adapter_config.json; the recipe's is the one meant.
        model = PeftModel.from_pretrained(self._base_model(self.folder), str(adapter))
        FastLanguageModel.for_inference(model)
        return self._loaded(model)

    def _base_model(self, folder: Path) -> PreTrainedModel:
        import torch
        from unsloth import FastLanguageModel

        draw_no_bars()
        out_of_memory.release()  # what a former phase left in reference cycles
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=self.section.max_length,
            dtype=getattr(torch, self.dtype),
            load_in_4bit=self.section.load_in_4bit,
            trust_remote_code=False,
            use_exact_model_name=True,  # never another repository that Unsloth knows by this name
            fix_tokenizer=False,  # the tokenizer is ours: Unsloth's is not used, and trying it out takes seconds
        )
        return model


def _attend_row_by_row() -> None:
    """Let Unsloth's attention keep to the rows of a pass within packed_attention.packed_pass.

    This changes Unsloth's modules, not a model, so it stays for the whole process: outside of such a pass the function
    does what Unsloth's own does.
    """
    for name in ("llama", "mistral", "qwen3"):  # Qwen2 takes Llama's
        module: Any = importlib.import_module(f"unsloth.models.{name}")
        theirs = module.run_attention
        if getattr(theirs, "by_row", False):
            continue

        def run_attention(
            *, Q: Tensor, K: Tensor, V: Tensor, theirs: Callable[..., Tensor] = theirs, **values: Any
        ) -> Tensor:
            """Unsloth's signature of an attention function. No row is longer than a window (choose.unfit)."""
            rows = packed_attention.current_rows()
            return theirs(Q=Q, K=K, V=V, **values) if rows is None else packed_attention.attend(Q, K, V, rows)

        run_attention.by_row = True  # type: ignore[attr-defined]
        module.run_attention = run_attention
