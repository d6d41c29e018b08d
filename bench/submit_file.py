"""One JSON with what a card did, and nothing about its owner: somebody with a T4 can send it back.

It holds figures, raw step samples, the card's name, package versions and the bench's settings. No host, user, path, row
or token is in it. Received files go to bench/results/received/.
"""

from __future__ import annotations

import getpass
import json
import platform
import re
from pathlib import Path
from typing import Any

from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.common.redaction import redacted

_PART = (
    "way", "stamps", "cap_gib", "sms", "sms_got", "flash_and_cudnn_attention", "context_gib", "context_after_gib",
    "peak_reserved_gib", "rates", "backend", "dtype", "about", "padding_free", "plan", "plan_at_the_end",
    "schedule_steps", "steps", "gradient", "out_of_memory", "run", "program",
)  # fmt: skip
_SETTINGS = (
    "prequantised", "config", "dtype", "rows", "rows_digest", "effective_batch_size", "schedule_steps",
    "steps_per_epoch", "tokens_per_step", "lora", "train", "seed", "order", "card",
)  # fmt: skip
_CONFIG = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip

#: In a text: an address, a path, an e-mail address, an IP address.
_HIDDEN = re.compile(
    r"(?P<address>\b\w+://[^\s'\"]+)|(?P<path>(?<![\w.])(?:(?:~\w*)?/|[A-Za-z]:\\)(?:[\w.@+-]+[/\\])+[\w.@+-]*)"
    r"|(?P<mail>[\w.+-]+@[\w-]+\.[\w.]+)|(?P<ip>\b\d{1,3}(?:\.\d{1,3}){3}\b)"
)


def write(name: str | None, results: Path) -> Path:
    """Write submit-CARD.json beside the result NAME (default: the newest) and return its path."""
    found = sorted(results.glob(f"{name or '*'}-train.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            f"{results}: no result{(name and f' {name}') or ''} to send yet. Measure first: "
            "python -m bench --quick --submit-file"
        )
    result = json.loads(found[-1].read_text(encoding="utf-8"))
    content = anonymous(result)
    path = results / f"submit-{content['settings']['card'].lower().replace(' ', '-')}.json"
    write_json(path, content)
    return path


def anonymous(result: dict[str, Any]) -> dict[str, Any]:
    """Return what may leave the machine: listed keys only, so that no new key gets out by itself."""
    settings = {key: result["settings"][key] for key in _SETTINGS}
    settings["config"] = {key: value for key, value in settings["config"].items() if key in _CONFIG}
    return {
        "kind": "train",
        "sent": True,
        "date": result["date"][:10],
        "environment": environment(result["environment"]),
        "settings": settings,
        "setups": {
            name: {way: {key: part[key] for key in _PART if key in part} for way, part in parts.items()}
            for name, parts in result["setups"].items()
        },
    }


def environment(described: dict[str, Any]) -> dict[str, Any]:
    """Return what may be told of a machine: versions, system, and the card's name, memory and driver."""
    gpu = described["gpu"]
    return {
        "python": described["python"],
        "system": described["system"],
        "packages": described["packages"],
        "gpu": {key: gpu[key] for key in ("name", "memory", "driver")} if gpu else None,
        "program": described["program"],
    }


def without_names(value: Any) -> Any:
    """Return a JSON value whose texts name no person, machine, path or address: errors of libraries name all of them.

    Keys of the environment are replaced too (common/redaction.py).
    """
    if isinstance(value, dict):
        return {key: without_names(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_names(each) for each in value]
    if not isinstance(value, str):
        return value
    text = redacted(value)
    for place in (str(Path.cwd()), str(Path.home())):  # which may hold a space
        text = text.replace(place, "PATH") if len(place) > 5 else text
    text = _HIDDEN.sub(lambda match: str(match.lastgroup).upper(), text)
    for name, word in ((platform.node(), "MACHINE"), (_user(), "USER")):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text) if len(name) > 1 else text
    return text


def _user() -> str:
    """Return the user's name; nothing where the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
