"""An adapter's adapter_config.json, which may come from outside: the few keys of LoRA and DoRA, and no other.

PEFT reads some 40 keys of it. Some name modules to import, some are regular expressions, some build layers of their
own. A run writes none of those keys, so a file with one is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

MAX_RANK = 4096
_NAME = re.compile(r"\w[\w.]{0,200}")  #: of a layer, with or without the names of the modules around it
#: Keys that say what the adapter is for, and change nothing that is computed here.
_DESCRIPTIVE = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type",
                "lora_dropout", "init_lora_weights"}  # fmt: skip
#: Keys that are read, and the values that they may have.
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save", "bias"}
#: Modules that can be trained and saved whole, and where they are in a model.
WHOLE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
#: Defaults of PEFT's that are neither empty nor false.
_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16, "fan_in_fan_out": False}


def check(folder: Path) -> None:
    """Check a folder's adapter_config.json.

    Raises:
        InputError: it is garbled, or asks for more than LoRA, DoRA and modules that are saved whole.
    """
    path = folder / "adapter_config.json"
    content = untrusted_files.json_object(path, remedy="Copy it again.")
    if (kind := content.get("peft_type")) != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}; only LORA is read.")
    _number(path, content, "r", MAX_RANK, int)
    _number(path, content, "lora_alpha", 1e6, (int, float))
    targets = content.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) and _NAME.fullmatch(t) for t in targets):
        raise InputError(f"{path}: target_modules is {_shown(targets)}; a list of layers' names is read, no pattern.")
    if content.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {_shown(content.get('bias'))}; only 'none' is read.")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(content.get(key, False), bool):
            raise InputError(f"{path}: {key} is {_shown(content[key])}; true or false was expected.")
    saved = content.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name in WHOLE for name in saved):
        raise InputError(f"{path}: modules_to_save is {_shown(saved)}; {' and '.join(WHOLE)} are read.")
    for key, value in content.items():
        if key not in _DESCRIPTIVE | _READ and value and value != _DEFAULTS.get(key):
            raise InputError(
                f"{path}: {key} is {_shown(value)}; an adapter of LoRA or DoRA leaves it empty, and no other is read."
            )


def _number(path: Path, content: dict[str, Any], key: str, most: float, types: Any) -> None:
    value = content.get(key)
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(f"{path}: {key} is {_shown(value)}; a number up to {most:g} was expected.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
