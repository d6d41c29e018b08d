"""What a base model's config.json and generation_config.json say: its sizes, and what can train and answer it.

No other module reads either file. A family of OWN has blocks, a loss and decoding of ours, as long as config.json says
nothing that they do not know. Every other model goes the general way: its layers are PEFT's and transformers' own, it
is trained row by row, and transformers' `generate` answers. A model that neither way can take is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.common.folders import expanded
from fast_ft.common.text_safety import escaped
from fast_ft.hub import gguf_base
from fast_ft.hub.model_shape import GIB, LINEARS, TARGET_MODULES, ModelShape
from fast_ft.hub.quantisation import HEAD, Quantisation

__all__ = ["GIB", "LINEARS", "OWN", "TARGET_MODULES", "FamilySpec", "ModelShape", "context_length", "read_config"]

#: Values of model_type with blocks and decoding of ours, and transformers' context where config.json names none.
OWN = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
#: What names of Llama 2, which has no config.json at hand, have in common.
LLAMA_2 = re.compile(r"llama-?2(?![.\d])", re.IGNORECASE)
#: Kinds of rope whose frequencies do not move with the length of a row.
STEADY_ROPE = ("default", "linear", "llama3", "yarn")
#: Keys that every family of OWN has, and whose values are read here, in ModelShape or by the loaded layers themselves.
_KNOWN = {
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "hidden_act",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout", "quantization_config", "eos_token_id",
}  # fmt: skip
_WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
#: Keys that one family has beside them. The biases are those of the loaded layers.
_KNOWN_OF = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": _WINDOW,
    "qwen3": _WINDOW | {"attention_bias"},
}
#: Keys that change nothing that is computed.
_COSMETIC = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label",
    "initializer_range", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache",
    "unsloth_fixed", "unsloth_version",
}  # fmt: skip
#: Keys of models that neither way takes, where they hold anything.
_REFUSED = {
    "is_encoder_decoder": "an encoder beside its decoder",
    "text_config": "parts beside its language model, such as one for pictures",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "n_routed_experts": "experts",
    "moe_num_experts": "experts",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json's content. Raises InputError where it is missing, garbled or far too large."""
    return untrusted_files.json_object(folder / "config.json", remedy="Copy or download the model again.")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json's content, {} where there is none. Raises InputError where it is garbled."""
    path = folder / "generation_config.json"
    return untrusted_files.json_object(path) if path.is_file() else {}


def end_token_ids(folder: Path) -> list[int]:
    """Return the ids that end an answer by generation_config.json, or by config.json where that says nothing."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            given = untrusted_files.json_object(folder / name).get("eos_token_id")
            ids = given if isinstance(given, list) else [given]
            if found := [each for each in ids if isinstance(each, int) and not isinstance(each, bool)]:
                return found
    return []


def has_llamas_layers(name_or_path: str) -> bool | None:
    """Return whether a model in a folder has Llama's linear layers, by their names; None: there is no such folder."""
    try:
        return FamilySpec.from_config(read_config(_folder(name_or_path))).general is None
    except (InputError, OSError, RuntimeError):
        return None


def _folder(name_or_path: str) -> Path:
    """Return the folder that a model's name means here; of a .gguf file, the one that it was converted to before."""
    if gguf_base.is_named(name_or_path):
        return gguf_base.folder(name_or_path, convert=False)
    return expanded(name_or_path)


def context_length(name_or_path: str) -> int | None:
    """Return the most tokens that a model can attend to, as far as its folder or its name tells."""
    try:
        return _context(read_config(_folder(name_or_path)))
    except (InputError, OSError, RuntimeError):  # RuntimeError: ~name of an unknown user
        return 4096 if LLAMA_2.search(name_or_path) else None


@dataclass(frozen=True)
class FamilySpec:
    """What blocks, loss, decoding, planner and LoRA files must know of a base model.

    `general` says in a few words why the model goes the general way; None: blocks and decoding of ours take it.
    `windows` has for each layer the most tokens that one token attends to, itself included; None: all before it.
    `alone_beyond`: longer rows share no batch with others, since a batch's longest row turns all of its rows' ropes.
    `softcap`: attention scores are capped, which torch's own attention function does not know.
    """

    model_type: str
    shape: ModelShape
    context: int | None
    general: str | None
    windows: tuple[int | None, ...]
    eps: float = 1e-6
    rope: str = "default"
    qk_norms: bool = False
    quantisation: Quantisation | None = None
    softcap: bool = False
    alone_beyond: int | None = None

    @classmethod
    def of(cls, folder: Path) -> FamilySpec:
        """Return what a model's folder says. Raises InputError as `from_config` does, and for a garbled file."""
        return cls.from_config(read_config(folder))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FamilySpec:
        """Return what config.json's content says.

        Raises InputError for a model that neither way takes, and for a value of a wrong kind.
        """
        kind = str(config.get("model_type", "llama"))
        _refuse_others(config, kind)
        shape, quantisation = ModelShape.from_config(config), Quantisation.from_config(config)
        if quantisation is not None:
            shape = replace(shape, unquantised_weights=_left_weights(shape, quantisation))
        rope, alone_beyond = _rope(config)
        windows = _windows(config, kind, shape.num_hidden_layers)
        return cls(
            model_type=kind,
            shape=shape,
            context=_context(config),
            general=_why_general(config, kind, rope, quantisation),
            windows=windows,
            eps=_number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            qk_norms=kind == "qwen3",
            quantisation=quantisation,
            softcap=bool(config.get("attn_logit_softcapping")),
            alone_beyond=alone_beyond,
        )

    @property
    def way(self) -> str | None:
        """The one line that plan and run say of a model on the general way, or None."""
        if self.general is None:
            return None
        return f"general way: {self.general}. PEFT's own layers train, transformers' generate answers, more slowly"

    def is_4bit(self, *, asked: bool) -> bool:
        """Return whether the base is loaded in 4 bits: the recipe asks for it, or it is stored so."""
        return asked or self.quantisation is not None

    def window_below(self, tokens: int) -> int | None:
        """Return the smallest window that hides anything in a row of this number of tokens, or None."""
        return min((window for window in self.windows if window is not None and window < tokens), default=None)


def _context(config: dict[str, Any]) -> int | None:
    return _whole(config, "max_position_embeddings") or OWN.get(str(config.get("model_type", "llama")))


def _refuse_others(config: dict[str, Any], kind: str) -> None:
    for key, what in _REFUSED.items():
        if config.get(key):
            raise InputError(
                f"the base model (model_type {escaped(kind)!r}) has {what} (config.json's {key}); language models of "
                "one decoder without experts are supported: give another model.name_or_path."
            )
    heads = config.get("architectures")
    if isinstance(heads, list) and heads and not any("CausalLM" in str(h) or "LMHead" in str(h) for h in heads):
        raise InputError(
            f"the base model's config.json names {escaped(str(heads[0]))!r}, which has no head that predicts tokens; "
            "give a model whose architecture ends in ForCausalLM."
        )


def _left_weights(shape: ModelShape, quantisation: Quantisation) -> int:
    """Return how many weights of Llama's linear layers a quantised base leaves in 16 bits."""
    sizes = dict(zip(LINEARS, shape.linear_shapes, strict=True))
    named = ((f"model.layers.{i}.{name}", size) for i in range(shape.num_hidden_layers) for name, size in sizes.items())
    return sum(a * b for name, (a, b) in named if quantisation.leaves(name))


def _why_general(config: dict[str, Any], kind: str, rope: str, quantisation: Quantisation | None) -> str | None:
    """Return what our blocks and our decoding do not know of a model, in a few words, or None."""
    if kind not in OWN:
        return f"model_type {escaped(kind)!r} has no blocks of ours"
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        return f"the activation {escaped(str(act))!r} is not in our blocks"
    if rope not in STEADY_ROPE:
        return f"the rope {escaped(rope)!r} is not in our decoding"
    if quantisation is not None and not quantisation.leaves(HEAD):
        return "its head is quantised, which our loss and our decoding do not know"
    if config.get("attention_dropout"):
        return "our attention has no dropout"
    for key, value in config.items():
        if value and key not in _KNOWN | _KNOWN_OF[kind] | _COSMETIC and not key.startswith("_"):
            return f"our blocks do not know config.json's {escaped(key)}"
    return None


def _rope(config: dict[str, Any]) -> tuple[str, int | None]:
    """Return the kind of rope, and the length beyond which a row's rope moves with it (None: it never does).

    A rope that turns a part of each head only, or that differs between layers, is a kind of its own here.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError("the base model's config.json has a rope that is no object: get it from its publisher")
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    kinds = [str(part.get("rope_type") or part.get("type") or "default") for part in parts]
    firsts = [each.get("original_max_position_embeddings") for each in (*parts, config)]
    known = [first for first in firsts if isinstance(first, int) and "dynamic" not in kinds]
    beyond = min(known, default=0) if {"dynamic", "longrope"} & {*kinds} else None
    if parts != [rope]:
        return "different in each kind of layer", beyond
    if any(part.get("partial_rotary_factor", 1) != 1 for part in (config, rope)):
        return "of a part of each head", beyond
    return kinds[0], beyond


def _windows(config: dict[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    """Return the layers' windows as transformers' configurations of Mistral, Qwen2 and Qwen3 have them.

    Only a family of OWN is asked: on the general way transformers' own masks hold the windows.
    """
    if "sliding_window" not in _KNOWN_OF.get(kind, ()):
        return (None,) * layers
    window = _whole(config, "sliding_window") if "sliding_window" in config else 4096
    if kind == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window"):
        return (None,) * layers
    types, first = config.get("layer_types"), _whole(config, "max_window_layers", least=0)
    if types is None:
        return tuple(window if index >= (28 if first is None else first) else None for index in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) < layers or not all(each in known for each in types):
        raise InputError("the base model's config.json has layer_types that do not fit its layers: copy it again")
    return tuple(window if each == "sliding_attention" else None for each in types[:layers])


def _whole(config: dict[str, Any], key: str, least: int = 1) -> int | None:
    """Return a whole number, None where the key is absent or null. Raises InputError for another value."""
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise InputError(f"the base model's config.json has {key} {escaped(str(value))}; a whole number was expected")
    return value


def _number(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"the base model's config.json has {key} {escaped(str(value))}; a number was expected")
    return float(value)
