"""An adapter's files: its tensors out of a model and into one, and whether a folder's fit a base model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common import out_of_memory, untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.hub.families import FamilySpec
from fast_ft.models import base_layers, lora_config, tensor_file

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_TENSOR = re.compile(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight")
_FLOATS = ("F32", "F16", "BF16")


def weights(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's names, where they are: these are the model's own, no copies."""
    import peft

    # PEFT takes the whole model's state on its way to these, for which bitsandbytes packs the base's scales
    found = out_of_memory.retried(lambda: peft.get_peft_model_state_dict(model))
    return {name: tensor.detach() for name, tensor in found.items()}


def load(model: PeftModel, path: Path) -> None:
    """Put the tensors of a safetensors file into a model's adapter, in place.

    Raises:
        InputError: the file holds tensors that the adapter has no place for.
    """
    import peft
    from safetensors.torch import load_file

    result = peft.set_peft_model_state_dict(model, load_file(str(path)))
    if result.unexpected_keys:
        raise InputError(
            f"{path}: tensors that this model's adapter has no place for, such as {result.unexpected_keys[0]}. "
            "It was made for another base model or other target_modules."
        )


def save(model: PeftModel, folder: Path, base_name: str, card: str) -> None:
    """Write adapter_model.safetensors, adapter_config.json and README.md (`card`) into an existing folder.

    They are what PEFT's save_pretrained writes, but for the base's name; writing them takes less memory.
    """
    tensor_file.save(folder / "adapter_model.safetensors", weights(model), {"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # the recipe's name, not this machine's cache folder, so that the adapter loads elsewhere
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def check(adapter: Path, base: Path) -> None:
    """Check that a folder holds an adapter, and that its tensors are those that fit the base model, by name and shape.

    Raises:
        InputError: no adapter, a pickle, a damaged file, tensors of another kind, or an adapter of another base model.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file() and (adapter / "adapter_model.bin").is_file():
        raise InputError(
            f"{adapter}: the adapter is a pickle (adapter_model.bin), which can run code when read. Convert it once, "
            "where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(folder) writes safetensors."
        )
    if not path.is_file() or not (adapter / "adapter_config.json").is_file():
        raise InputError(
            f"{adapter}: no adapter here. adapter_model.safetensors and adapter_config.json are needed; train first."
        )
    layers = base_layers.linear_layers(base, FamilySpec.of(base))
    lora_config.check(adapter)
    settings = untrusted_files.json_object(adapter / "adapter_config.json")
    shapes = _shapes(path)
    expected = _expected(layers, settings["r"], settings["target_modules"])
    if wrong := sorted(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)):
        found, wanted = (list(each[wrong[0]]) if wrong[0] in each else "absent" for each in (shapes, expected))
        raise InputError(
            f"{path}: {escaped(wrong[0][:120])} is {found}; by adapter_config.json and {base} {wanted} was expected. "
            "The adapter was made for another base model, or the file is damaged: use the base model that it was "
            "trained on, or copy it again."
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {tensor: shape} of a safetensors file; InputError where it holds anything else than LoRA's matrices."""
    from safetensors import SafetensorError, safe_open

    path.open("rb").close()  # the library calls a file that may not be read absent
    try:
        with safe_open(str(path), framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}). Train again, or copy it again.") from None
    for name, shape in shapes.items():
        if not _TENSOR.fullmatch(name) or len(shape) != 2 or dtypes[name] not in _FLOATS:
            raise InputError(
                f"{path}: holds {escaped(name[:120])!r}, {dtypes[name]} of shape {list(shape)}; only the matrices A "
                "and B of LoRA are read. Remove all other tensors from it."
            )
    return shapes


def _expected(layers: dict[str, tuple[int, int]], r: int, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Return {tensor: (rows, columns)} of a LoRA on the layers whose names are, or end in, one of `targets`."""
    found = {}
    for layer, (inward, outward) in layers.items():
        if any(base_layers.is_named(layer, target) for target in targets):
            found[f"base_model.model.{layer}.lora_A.weight"] = (r, inward)
            found[f"base_model.model.{layer}.lora_B.weight"] = (outward, r)
    return found
