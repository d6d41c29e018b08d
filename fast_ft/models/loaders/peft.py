"""transformers, PEFT and bitsandbytes alone; and the same with our own decoder blocks in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import out_of_memory
from fast_ft.common.errors import InputError
from fast_ft.models import lora_files, nf4, own_pass, weight_layout
from fast_ft.models.base_layers import decoder_layers
from fast_ft.models.loaders.base import LoadedModel, LoaderBase, draw_no_bars
from fast_ft.models.patches import ModelPatches

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class PeftLoader(LoaderBase):
    """transformers, PEFT and bitsandbytes, unpatched; on a CPU or an NVIDIA GPU."""

    name = "peft"

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train: a new one, or one whose weights are those in a folder."""
        base, patches = self._base_model(), ModelPatches()
        model = self.with_adapter(base, patches)
        if adapter is not None:
            lora_files.load(model, adapter / "adapter_model.safetensors")
        return self._checked(model, patches)

    def _checked(self, model: PeftModel, patches: ModelPatches) -> LoadedModel:
        """Return the model, sent the general way where config.json says so, or where our pass gives other numbers.

        Raises:
            InputError: the numbers differ, and the recipe names a backend that is ours.
        """
        loaded = self._loaded(model, patches)
        if self.family.way is not None:
            self.notes.append(self.family.way)
        elif problem := own_pass.difference(model, self.dtype):
            if self.section.backend == "fused":
                raise InputError(f"model.backend: 'fused' cannot train this: {problem}. Use model.backend=auto.")
            loaded.general = problem
            self.notes.append(replace(self.family, general=problem).way or "")
        return loaded

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
            use_rslora=self.lora.use_rslora,
            use_dora=self.lora.use_dora,
            modules_to_save=list(self.lora.modules_to_save) or None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base, config)
        self._fit_whole_modules(model, patches)
        return model

    def _fit_whole_modules(self, model: PeftModel, patches: ModelPatches) -> None:
        """Let embeddings and a head that are trained in fp32 stand between layers of the base's dtype."""
        import torch

        core, dtype = model.get_base_model(), getattr(torch, self.dtype)
        for module in (core.get_input_embeddings(), core.get_output_embeddings()):
            if not hasattr(module, "modules_to_save"):
                continue
            trained = module.modules_to_save["default"]
            trained.float()
            patches.hook(trained.register_forward_pre_hook(_in_the_dtype_of_its_weight))
            patches.hook(trained.register_forward_hook(lambda _, __, output: output.to(dtype)))

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
        # of other families transformers chooses, but for one of the functions that do not know scores that are capped
        attention = "sdpa" if self.family.general is None else "eager" if self.family.softcap else None
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
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **extra,
        )
        nf4.compute_in(model, dtype)
        weight_layout.by_layer(decoder_layers(model))
        return model


def _in_the_dtype_of_its_weight(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a head's input in its weight's dtype; token ids stay as they are."""
    first = arguments[0]
    return (first.to(module.weight.dtype) if first.is_floating_point() else first, *arguments[1:])


class FusedLoader(PeftLoader):
    """PeftLoader, its layers trained through our own blocks; NVIDIA GPUs only."""

    name = "fused"

    def problem(self) -> str | None:
        """Return why our blocks cannot train this model on this card, or None. Their kernels are compiled for it."""
        import torch

        from fast_ft.models.fused_block import block, obstacles  # loads torch

        like = torch.empty(1, dtype=getattr(torch, self.dtype), device=self.device)
        return obstacles.unknown(self.family) or block.check(like, self.family.shape)

    def with_adapter(self, base: PreTrainedModel, patches: ModelPatches) -> PeftModel:
        """Return the base with a new adapter, drawn from the seed, and our blocks installed."""
        model = super().with_adapter(base, patches)
        self._install_blocks(model, patches)
        return model

    def _install_blocks(self, model: PeftModel, patches: ModelPatches) -> None:
        from fast_ft.models.fused_block import block

        if reason := block.install(model, patches):
            self.notes.append(f"{reason}: trained through PEFT's own layers, more slowly and in more memory.")
