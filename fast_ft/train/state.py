"""The state of training: adapter, optimizer, loss scale, and how far it came; safetensors and JSON, no pickles.

A state folder holds adapter.safetensors, optimizer.safetensors and state.json, which has the digests of all three.
Random states are not in it: every training step seeds itself from the recipe's seed and its own number
(train/session.py), so there is nothing to restore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.atomic_files import sha256_file
from fast_ft.common.errors import InputError
from fast_ft.models import lora_files, tensor_file

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer

_TENSOR = "__tensor__"
_TENSORS = ("adapter.safetensors", "optimizer.safetensors")
FILES = (*_TENSORS, "state.json")


@dataclass
class TrainState:
    """How far training came: what a checkpoint holds besides the adapter and the optimizer.

    `stage` counts from 0; `step` is the number of finished steps of that stage, `global_step` of all stages. Where a
    budget of minutes runs out, the learning rate goes down from `anneal_from` to `stop_at`, and training ends there.
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    scaler: dict[str, Any] | None = None  #: state of fp16's GradScaler
    rate_factor: float = 1.0  #: on the learning rate; halved once after bad numbers
    seconds: float = 0.0  #: of training, in all sessions
    minutes: float | None = None  #: the budget for which the next two were chosen
    anneal_from: int = 0  #: the step after which the learning rate goes down, over all stages
    stop_at: int | None = None  #: the step at which it is down, and training ends early
    best_step: int | None = None  #: the step after which the validation loss was least
    best_loss: float | None = None  #: that loss, in nats per trained token

    @property
    def begins_to_anneal(self) -> bool:
        """Whether the learning rate begins to go down after this step, since a budget is running out."""
        return self.stop_at is not None and self.anneal_from == self.global_step

    @property
    def is_annealed(self) -> bool:
        """Whether the learning rate went down early, and is down, where training stands."""
        return self.stop_at is not None and self.anneal_from < self.stop_at <= self.global_step

    def rate_scale(self, index: int) -> float:
        """Return the factor on the schedule's learning rate for step `index`, counted from 0 over all stages."""
        if self.stop_at is None or self.stop_at == self.anneal_from:
            return self.rate_factor
        steps = self.stop_at - self.anneal_from
        return self.rate_factor * max(0, steps - (index - self.anneal_from)) / steps

    def fit_to(self, stage_steps: Sequence[int]) -> None:
        """Find stage and step by `global_step` where the stages, of these many steps, are not the checkpoint's.

        That happens where a resume with another recipe is forced.
        """
        before = sum(stage_steps[: self.stage])
        if self.stage < len(stage_steps) and before + self.step == self.global_step <= sum(stage_steps):
            return
        self.stage, self.step = 0, self.global_step
        while self.stage < len(stage_steps) and self.step >= stage_steps[self.stage]:
            self.step -= stage_steps[self.stage]
            self.stage += 1


def save(folder: Path, model: PeftModel, optimizer: Optimizer, train_state: TrainState) -> None:
    """Write the state into an existing folder (atomic_files.replace_folder makes it appear whole)."""
    tensor_file.save(folder / "adapter.safetensors", lora_files.weights(model))
    tensors: dict[str, Any] = {}
    plain = _flatten(optimizer.state_dict()["state"], "", tensors)
    tensor_file.save(folder / "optimizer.safetensors", tensors)
    digests = {name: sha256_file(folder / name) for name in _TENSORS}
    content = {"progress": asdict(train_state), "optimizer": plain, "digests": digests}
    (folder / "state.json").write_text(json.dumps(content | {"digest": _digest(content)}, indent=1), encoding="utf-8")


def save_weights(folder: Path, model: PeftModel) -> None:
    """Write the adapter alone into an existing folder, with its digest."""
    tensor_file.save(folder / _TENSORS[0], lora_files.weights(model))
    digest = sha256_file(folder / _TENSORS[0])
    (folder / "weights.json").write_text(json.dumps({"digest": digest}), encoding="utf-8")


def load_weights(folder: Path, model: PeftModel) -> None:
    """Put the adapter that `save_weights` wrote into a model, in place.

    Raises:
        InputError: The file is gone, or is not as it was written.
    """
    try:
        wanted = json.loads((folder / "weights.json").read_text(encoding="utf-8"))["digest"]
        same = sha256_file(folder / _TENSORS[0]) == wanted
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{folder}: the weights of the least validation loss are gone or changed. Set "
                         "train.load_best=false and --force-resume to end with the last ones.")  # fmt: skip
    lora_files.load(model, folder / _TENSORS[0])


def problem(folder: Path) -> str | None:
    """Return what is wrong with a saved state, by its digests; None where it is as it was written."""
    try:
        content = _read(folder)
    except InputError as error:
        return str(error)
    if content.pop("digest", None) != _digest(content):
        return "state.json is not as it was written"
    for name, wanted in content["digests"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != wanted:
            return f"{name} is not as it was written"
    return None


def read(folder: Path) -> TrainState:
    """Return how far a saved state came.

    Raises:
        InputError: The state cannot be read, or another version of fast_ft wrote it.
    """
    try:
        content = _read(folder)["progress"]
        content.pop("schedule_step", None)  # an earlier version counted the schedule's steps apart
        return TrainState(**content)
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder}: another version of fast_ft wrote this checkpoint ({error}). Delete checkpoints/ to train again."
        ) from None


def load(folder: Path, model: PeftModel, optimizer: Optimizer) -> None:
    """Put a saved state into a model's adapter and into an optimizer, in place.

    Raises:
        InputError: The state is of an adapter of other modules or shapes.
    """
    from safetensors.torch import load_file

    _check_shapes(folder, model)
    lora_files.load(model, folder / "adapter.safetensors")
    tensors = load_file(str(folder / "optimizer.safetensors"))
    state = {int(index): value for index, value in _restore(_read(folder)["optimizer"], tensors).items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_shapes(folder: Path, model: PeftModel) -> None:
    from safetensors import safe_open

    wanted = {name: list(tensor.shape) for name, tensor in lora_files.weights(model).items()}
    with safe_open(str(folder / "adapter.safetensors"), framework="np") as tensors:
        there = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if there != wanted:
        raise InputError(
            f"{folder}: this checkpoint is of another base model, or of another lora.r or lora.target_modules. "
            "Give this run its own output_dir."
        )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: this checkpoint cannot be read ({error}). Delete the folder to go back.") from None


def _flatten(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    """Return `value` with each tensor moved to `tensors` and a mark with its key in its place."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {str(key): _flatten(item, f"{path}.{key}", tensors) for key, item in value.items()}
    return value


def _restore(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _restore(item, tensors) for key, item in value.items()}
    return value
