"""An adapter's files: its tensors out of a model and into one, and whether a folder's fit a base model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.hub.families import FamilySpec
from fast_ft.models import base_layers, lora_config, tensor_file
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

#: Names of an adapter's tensors, by dimensions: A and B, embeddings and a head that are saved whole; DoRA's sizes.
_TENSORS = {
    2: re.compile(r"base_model\.model\.([\w.]+\.lora_[AB]|model\.embed_tokens|lm_head)\.weight"),
    1: re.compile(r"base_model\.model\.[\w.]+\.lora_magnitude_vector"),
}
_FLOATS = ("F32", "F16", "BF16")
_SHARED = ("r", "lora_alpha", "use_rslora", "use_dora")  #: keys of adapter_config.json that a recipe has, too


def weights(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's names, where they are: these are the model's own, no copies."""
    import peft

    # the parameters: for the whole model's state, which PEFT would take, bitsandbytes packs the base's scales
    own = dict(model.named_parameters(remove_duplicate=False))
    # No vocabulary is changed here. To see that, PEFT would read the base's configuration again at each checkpoint.
    targets = model.peft_config["default"].target_modules or ()
    whole = "auto" if "lm_head" in targets else False
    found = peft.get_peft_model_state_dict(model, own, save_embedding_layers=whole)
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


def put_whole_modules_back(model: PeftModel) -> None:
    """Give a model its own embeddings and head again where an adapter trained copies of them, which PEFT would keep."""
    core = model.get_base_model()
    trained = [(path, module) for path, module in core.named_modules() if hasattr(module, "modules_to_save")]
    for path, module in trained:
        above, _, name = path.rpartition(".")
        setattr(core.get_submodule(above), name, module.original_module)


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
    expected = _expected(layers, FamilySpec.of(base), settings)
    if wrong := sorted(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)):
        found, wanted = (list(each[wrong[0]]) if wrong[0] in each else "absent" for each in (shapes, expected))
        raise InputError(
            f"{path}: {escaped(wrong[0][:120])} is {found}; by adapter_config.json and {base} {wanted} was expected. "
            "The adapter was made for another base model, or the file is damaged: use the base model that it was "
            "trained on, or copy it again."
        )


def check_start(adapter: Path, base: Path, lora: schema.Lora) -> None:
    """Check that training may start from an adapter: it fits the base, and is what the recipe's `lora` asks for.

    Raises:
        InputError: it does not, or is not; the message has the values that the recipe must have.
    """
    try:
        check(adapter, base)
    except InputError as error:
        raise InputError(f"model.adapter: {error}") from None
    there = untrusted_files.json_object(adapter / "adapter_config.json")
    wanted = {name: there.get(name) or getattr(schema.Lora(), name) for name in _SHARED}
    wanted["modules_to_save"] = sorted(there.get("modules_to_save") or [])
    targets = {name.rpartition(".")[2] for name in there["target_modules"]}
    all_linear = {name.rpartition(".")[2] for name in base_layers.linear_layers(base, FamilySpec.of(base))} - {
        "lm_head"
    }
    is_all = targets == all_linear
    wanted["target_modules"] = "all-linear" if is_all else sorted(there["target_modules"])
    asked = lora.model_dump(include={*wanted})
    for name in ("modules_to_save", "target_modules"):
        asked[name] = asked[name] if isinstance(asked[name], str) else sorted(asked[name])
    if is_all and set(lora.target_modules) == all_linear:
        asked["target_modules"] = "all-linear"
    if odd := [name for name in wanted if wanted[name] != asked[name]]:
        values = " ".join(f"lora.{name}={_as_override(wanted[name])}" for name in odd)
        raise InputError(
            f"model.adapter: {adapter} is another kind of adapter than the recipe's lora describes. Write {values}, "
            "or start from a new adapter: model.adapter=null."
        )


def misfit(path: Path, base: Path, lora: schema.Lora) -> str | None:
    """Return which tensor of a saved adapter is not as a recipe's `lora` makes it over a base; None where all are.

    Raises:
        InputError: the file cannot be read, or the base cannot be built.
    """
    family = FamilySpec.of(base)
    layers = base_layers.linear_layers(base, family)
    targets = [name for name in layers if "." in name] if lora.target_modules == "all-linear" else lora.target_modules
    shapes, expected = _shapes(path), _expected(layers, family, lora.model_dump() | {"target_modules": targets})
    for name in sorted({**shapes, **expected}):
        found, wanted = shapes.get(name), expected.get(name)
        if wanted is None:
            return f"the recipe's adapter has no {escaped(name[:120])}"
        if found != wanted:
            there = "is missing" if found is None else f"has the shape {list(found)}"
            return f"{escaped(name[:120])} {there}, where the recipe's adapter has {list(wanted)}"
    return None


def _as_override(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {tensor: shape} of a safetensors file; InputError where it holds anything else than an adapter's tensors.

    These are the matrices A and B of LoRA, DoRA's sizes, and the weights of modules that are saved whole.
    """
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
        allowed = _TENSORS.get(len(shape))
        if allowed is None or not allowed.fullmatch(name) or dtypes[name] not in _FLOATS:
            raise InputError(
                f"{path}: holds {escaped(name[:120])!r}, {dtypes[name]} of shape {list(shape)}; only the matrices A "
                "and B of LoRA are read, DoRA's sizes, embeddings and a head that are saved whole. Remove all others."
            )
    return shapes


def _expected(
    layers: dict[str, tuple[int, int]], family: FamilySpec, settings: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return {tensor: shape} of an adapter by its adapter_config.json's content.

    A LoRA is on the layers whose names are, or end in, one of the target modules.
    """
    found: dict[str, tuple[int, ...]] = {}
    r, targets = settings["r"], settings["target_modules"]
    for name in settings.get("modules_to_save") or []:
        size = (family.shape.vocab_size, family.shape.hidden_size)
        found[f"base_model.model.{lora_config.WHOLE[name]}.weight"] = size
    for layer, (inward, outward) in layers.items():
        if any(base_layers.is_named(layer, target) for target in targets):
            found[f"base_model.model.{layer}.lora_A.weight"] = (r, inward)
            found[f"base_model.model.{layer}.lora_B.weight"] = (outward, r)
            if settings.get("use_dora"):
                found[f"base_model.model.{layer}.lora_magnitude_vector"] = (outward,)
    return found
