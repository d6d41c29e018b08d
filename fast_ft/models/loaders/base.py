"""What all loaders share: a model on its device, its tokenizer and dtype, and the calls that the other rooms make."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fast_ft.common import out_of_memory, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.hub import download
from fast_ft.hub.families import FamilySpec
from fast_ft.models.patches import ModelPatches
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Said where a recipe that means Unsloth is trained by several processes.
ALONE_ONLY = "Unsloth trains in one process only, and several train through our own blocks"


def draw_no_bars() -> None:
    """Let transformers draw no bar while it loads a model: it takes seconds, and the bars stay on the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@dataclass
class LoadedModel:
    """A model on its device, and what is known of it.

    `model` is a PeftModel; `tokenizer` is transformers' own, for whoever loads the adapter later (our own token ids
    come from data/encoding.py). `open_tokenizer` opens it once it is asked for, which answering never does. `backend`
    is the loader's name, `dtype` what the base computes in. `notes` are sentences for the manifest. Whoever replaces a
    forward or hangs a hook on the model does so through `patches`.
    `general` says why the model goes the general way (hub/families.py); None: our passes and our decoding take it.
    """

    model: Any  # a PeftModel, until `free`
    open_tokenizer: Callable[[], Any]
    backend: str
    device: str
    dtype: str
    notes: list[str] = field(default_factory=list)
    patches: ModelPatches = field(default_factory=ModelPatches)
    general: str | None = None

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return self.open_tokenizer()

    def free(self) -> None:
        """Give the model's memory back, so that the next one fits where this one was."""
        self.model, self.patches = None, ModelPatches()  # patches hold parts of the model
        out_of_memory.release()
        out_of_memory.clear_workspaces()


class Loader(Protocol):
    """Loads a base model with an adapter. `name` is "unsloth", "peft" or "fused"."""

    name: str
    notes: list[str]

    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train: a new one, or the one in a folder."""

    def for_generation(self, adapter: Path) -> LoadedModel:
        """Return a fresh base model with the adapter in a folder, ready to answer."""


class LoaderBase(ABC):
    """A Loader that reads a base model's folder: the folder, the model's dtype, and the adapter's arguments."""

    name = ""

    def __init__(self, model: schema.Model, lora: schema.Lora, seed: int) -> None:
        import torch

        self.section, self.lora, self.seed = model, lora, seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = compute_dtype(model.dtype, self.device)
        self.notes: list[str] = []
        self.folder = download.model_folder(model.name_or_path, model.revision)
        self.family = FamilySpec.of(self.folder)

    @abstractmethod
    def for_training(self, adapter: Path | None = None) -> LoadedModel:
        """Return the base model with a LoRA adapter to train: a new one, or the one in a folder."""

    @abstractmethod
    def with_adapter(self, base: PreTrainedModel, patches: ModelPatches) -> PeftModel:
        """Return a base model that is loaded with a new adapter, drawn from the seed; `patches` note what changed."""

    @abstractmethod
    def for_generation(self, adapter: Path) -> LoadedModel:
        """Return a fresh base model with the adapter in a folder, ready to answer."""

    def _loaded(self, model: PeftModel, patches: ModelPatches | None = None) -> LoadedModel:
        changes = patches or ModelPatches()
        return LoadedModel(
            model, functools.cache(self._tokenizer), self.name, self.device, self.dtype, self.notes, changes,
            self.family.general,
        )  # fmt: skip

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Return transformers' tokenizer, padding with another token than its EOS."""
        source = self.section.tokenizer or self.section.name_or_path
        tokenizer = open_tokenizer(download.tokenizer_folder(source, self.section.revision))
        if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
            others = [tokenizer.unk_token, *tokenizer.convert_ids_to_tokens([0, 1])]
            tokenizer.pad_token = next(token for token in others if token and token != tokenizer.eos_token)
        return tokenizer


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer of a folder, of the class that its tokenizer_config.json names.

    AutoTokenizer goes by the model_type of some families, whatever the folder's files say. A Mistral with nothing but
    SentencePiece's tokenizer.model gets other ids from it than from LlamaTokenizer, which such a folder asks for.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    named = untrusted_files.json_object(path).get("tokenizer_class") if path.is_file() else None
    kind: Any = transformers.AutoTokenizer
    if (folder / "tokenizer.json").is_file():
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            kind = transformers.PreTrainedTokenizerFast
    elif named in ("LlamaTokenizer", "LlamaTokenizerFast"):
        kind = transformers.LlamaTokenizer
    return kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, padding_side="right")


def compute_dtype(wanted: str, device: str) -> str:
    """Return the dtype to compute in. For auto: bfloat16 from compute capability 8.0 on, float32 on a CPU.

    torch claims bfloat16 for a T4 too, where it is emulated, so it is not asked.

    Raises:
        InputError: bfloat16 is wanted on a card that has it not.
    """
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
