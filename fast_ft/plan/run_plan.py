"""What is settled once for a run, and kept in plan.json: how its steps are cut, and how its prompts are decoded.

It is obeyed when the run is resumed, done again or reproduced. plans.py settles it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.plan.decode_pool import DecodePlan, read_products, write_products


@dataclass(frozen=True)
class TrainPlan:
    """How an effective batch is cut. GiB are predicted peaks, CUDA context included; 0 on a CPU, without predictions.

    A micro-batch has at most `micro_batch` rows and `most_tokens` tokens (None: no limit). The first
    `recompute_layers` layers' activations are computed again. `capture`: passes are replayed from CUDA graphs.
    `step_seconds` is a mean. `world_size` processes share each effective batch; limits and GiB are those of one.
    `backend`: whose costs they are. `memory_gib` is what the plan may take.
    """

    micro_batch: int
    most_tokens: int | None = None
    recompute_layers: int = 0
    capture: bool = False
    memory_gib: float = 0.0
    train_gib: float = 0.0
    step_seconds: float = 0.0
    world_size: int = 1
    backend: str = ""


#: plan.json's keys, in its order, and what holds them: one flat object, as all versions write it.
_KEYS = {
    "micro_batch": ("train", "micro_batch"),
    "most_tokens": ("train", "most_tokens"),
    "recompute_layers": ("train", "recompute_layers"),
    "capture": ("train", "capture"),
    "generation_batch": ("decode", "slots"),
    "memory_gib": ("train", "memory_gib"),
    "train_gib": ("train", "train_gib"),
    "generate_gib": ("decode", "gib"),
    "cache_tokens": ("decode", "cache_tokens"),
    "dequantise": ("decode", "dequantise"),
    "kv_cache": ("decode", "kv_cache"),
    "products": ("run", "products"),
    "step_seconds": ("train", "step_seconds"),
    "world_size": ("train", "world_size"),
    "backend": ("train", "backend"),
    "settled_for": ("decode", "settled_for"),
}


@dataclass(frozen=True)
class RunPlan:
    """What is settled once for a run, and written to one file.

    `train` also holds the memory that there was. `decode` is how the run's own prompts are decoded; None while there
    are none. `products` are as DecodePlan's, for all numbers of rows so far, whatever was answered.
    """

    train: TrainPlan
    decode: DecodePlan | None
    products: str = ""

    def __post_init__(self) -> None:
        read_products(self.products)

    def with_decoding(self, plan: DecodePlan) -> RunPlan:
        """Return the plan with another way to decode: of other prompts, by other settings, or within less memory."""
        return replace(self, decode=replace(plan, products=""))

    def with_products(self, products: str) -> RunPlan:
        """Return the plan with products for further numbers of rows; what is chosen already stays."""
        return replace(self, products=write_products(read_products(products) | read_products(self.products)))

    def to_json(self) -> dict[str, Any]:
        """Return plan.json's content. A plan that no run keeps does not say what its pool is for."""
        parts = {"train": self.train, "decode": self.decode, "run": self}
        held = {key: getattr(parts[part], name) for key, (part, name) in _KEYS.items() if parts[part] is not None}
        return {key: value for key, value in held.items() if value or key != "settled_for"}

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path) -> RunPlan:
        """Return the plans that a file holds.

        Raises InputError for keys of another version, values of another type, and a plan that is not whole.
        """
        hints = {part: get_type_hints(kind) for part, kind in _PARTS.items()}
        if unknown := sorted(content.keys() - _KEYS.keys()):
            raise InputError(f"{path}: the plan has {escaped(unknown[0])!r}, which this fast_ft does not know")
        parts: dict[str, dict[str, Any]] = {part: {} for part in hints}
        for key, value in content.items():
            part, name = _KEYS[key]
            hint, whole = hints[part][name], isinstance(value, int) and not isinstance(value, bool)
            if not isinstance(value, hint) and not (hint is float and whole):
                raise InputError(f"{path}: the plan's {key} is of type {type(value).__name__}")
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1e9:
                raise InputError(f"{path}: the plan's {key} is {value}")
            parts[part][name] = value
        try:
            decode = DecodePlan(**parts["decode"]) if parts["decode"] else None
            return cls(TrainPlan(**parts["train"]), decode, **parts["run"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: the plan is not whole ({error})") from None


_PARTS = {"train": TrainPlan, "decode": DecodePlan, "run": RunPlan}
