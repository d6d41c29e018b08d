"""transformers, PEFT and bitsandbytes alone; and the same with our own decoder blocks in training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import out_of_memory
from fast_ft.hub.families import ModelShape, read_config
from fast_ft.models import lora_files
from fast_ft.models.loaders.base import LoadedModel, LoaderBase, draw_no_bars
from fast_ft.models.patches import ModelPatches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PeftLoader(LoaderBase):
    """transformers, PEFT and bitsandbytes, unpatched; on a CPU or an NVIDIA GPU."""

    name = "peft"

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train: a new one, or the one in a folder."""
        import peft

        base, patches = self._base_model(), ModelPatches()
        if adapter is not None:
            return self._loaded(peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True), patches)
        return self._loaded(self.with_adapter(base, patches), patches)

    def with_adapter(self, base: PreTrainedModel, patches: ModelPatches) -> PeftModel:
        """Return the base with a new adapter, drawn from the seed."""
        import peft
        import torch

        patches.remember(base, "peft_config", "_hf_peft_config_loaded")  # PEFT warns where a second adapter finds them
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

    def for_generation(self, adapter: Path) -> LoadedModel:
        """Return a fresh base model with the adapter in a folder, ready to answer.

        Raises:
            InputError: the folder holds no adapter, or one that does not fit the base model.
        """
        import peft

        lora_files.check(adapter, self.folder)
        base = self._base_model()
        base.config.use_cache = True
        return self._loaded(peft.PeftModel.from_pretrained(base, str(adapter)).eval())

    def _base_model(self) -> PreTrainedModel:
        import torch
        import transformers

        out_of_memory.release()  # what a former phase left in reference cycles
        draw_no_bars()
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


class FusedLoader(PeftLoader):
    """PeftLoader, its layers trained through our own blocks; NVIDIA GPUs only."""

    name = "fused"

    def problem(self) -> str | None:
        """Return why our blocks cannot train this model on this card, or None. Their kernels are compiled for it."""
        import torch

        from fast_ft.models.fused_block import block  # loads torch

        config = read_config(self.folder)
        like = torch.empty(1, dtype=getattr(torch, self.dtype), device=self.device)
        return block.unknown(config) or block.check(like, ModelShape.from_config(config))

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train through our blocks; `notes` say where PEFT's remain."""
        loaded = super().for_training(adapter)
        if adapter is not None:
            self._install_blocks(loaded.model, loaded.patches)
        return loaded

    def with_adapter(self, base: PreTrainedModel, patches: ModelPatches) -> PeftModel:
        """Return the base with a new adapter, drawn from the seed, and our blocks installed."""
        model = super().with_adapter(base, patches)
        self._install_blocks(model, patches)
        return model

    def _install_blocks(self, model: PeftModel, patches: ModelPatches) -> None:
        from fast_ft.models.fused_block import block

        if reason := block.install(model, patches):
            self.notes.append(f"{reason}: trained through PEFT's own layers, more slowly and in more memory.")
