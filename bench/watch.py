"""What a way of training does, seen from outside: the same callback on every trainer.

Seconds are between the ends of optimizer steps, the GPU waited for. What the watching itself takes is left out.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable
from typing import Any

from fast_ft.data.encoding import IGNORE_INDEX

SKETCH = 2048  #: numbers that stand for a gradient of millions


class Watch:
    """Records of one run. `stamps` are seconds since the command was given; `steps` has a dict for each step."""

    def __init__(self, started: float) -> None:
        self._started = started  # time.monotonic() of the parent: one clock for all processes of a machine
        self._paused = self._last = 0.0
        self._inputs: list[tuple[Any, Any]] = []
        self.stamps: dict[str, float] = {}
        self.steps: list[dict[str, Any]] = []
        self.gradient: dict[str, Any] = {}
        self._gradients: dict[str, Any] = {}

    def stamp(self, name: str) -> float:
        """Note the time under this name, once; return it."""
        now = self._now()
        self.stamps.setdefault(name, round(now, 4))
        return now

    def saw(self, tokens: Any, targets: Any) -> None:
        """Keep a batch as the model gets it: tokens, and at each the one to be learnt next; equal shapes."""
        self._inputs.append((tokens, targets))

    def forget(self) -> None:
        """Drop the batches of a step that is done again."""
        self._inputs.clear()

    def attach(self, trainer: Any, *, stop_after: int) -> None:
        """Watch a trainer that is not yet running; stop it after so many steps, its schedule left as it is."""
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                _wait()
                watch.stamp("train_begin")

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if not watch.steps and "first_step_begin" not in watch.stamps:
                    _wait()
                    watch._last = watch.stamp("first_step_begin")

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                if not watch.gradient:
                    watch._pause(lambda: watch._take_gradients(trainer.model))

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                _wait()
                now = watch._now()
                if not watch.steps:
                    watch.stamp("first_step_end")
                skipped = bool(trainer.accelerator.optimizer_step_was_skipped)
                watch.steps.append({"seconds": round(now - watch._last, 5), "skipped": skipped})
                watch._last = now
                watch._pause(watch._describe_inputs)
                control.should_training_stop |= len(watch.steps) >= stop_after

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
                if "grad_norm" in logs:
                    watch.steps[-1] |= {name: _number(logs[name]) for name in ("loss", "grad_norm")}

        trainer.add_callback(Callback())

    def finish(self) -> None:
        """Reduce the gradients to a sketch; after training, since it takes a second."""
        if self._gradients:
            self.gradient |= {
                "sketch": sketch(self._gradients),
                "norms": {name: float(g.norm()) for name, g in sorted(self._gradients.items())},
            }
            self._gradients = {}

    def _now(self) -> float:
        return time.monotonic() - self._started - self._paused

    def _pause(self, work: Callable[[], None]) -> None:
        _wait()
        started = time.monotonic()
        work()
        self._paused += time.monotonic() - started

    def _take_gradients(self, model: Any) -> None:
        """Copy the adapter's gradients of the first step where they are finite: fp16's loss scale skips some steps."""
        import torch

        found = {
            plain_name(name): weight.grad.detach().to("cpu", torch.float32, copy=True)  # ours are overwritten
            for name, weight in model.named_parameters()
            if weight.requires_grad and weight.grad is not None
        }
        if found and all(bool(g.isfinite().all()) for g in found.values()):
            self._gradients = found
            self.gradient = {"step": len(self.steps) + 1}

    def _describe_inputs(self) -> None:
        pairs = [pair for tokens, targets in self._inputs for pair in trained_pairs(tokens, targets)]
        self.steps[-1] |= {
            "supervised_tokens": len(pairs),
            "positions": sum(tokens.numel() for tokens, _ in self._inputs),
            "passes": len(self._inputs),
            "flat": all(tokens.dim() == 1 or tokens.shape[0] == 1 for tokens, _ in self._inputs),
            "digest": digest(pairs),
        }
        self._inputs.clear()


def trained_pairs(tokens: Any, targets: Any) -> list[int]:
    """Return one number for each trained token: the token before it and itself, however rows are laid out."""
    kept = targets != IGNORE_INDEX
    return (tokens[kept].long() * 1_000_003 + targets[kept].long()).tolist()


def digest(pairs: list[int]) -> str:
    """The digest of what a step trains on, whatever the order of its rows."""
    return hashlib.sha256(",".join(map(str, sorted(pairs))).encode()).hexdigest()[:16]


def sketch(gradients: dict[str, Any], size: int = SKETCH) -> list[float]:
    """Return a count sketch of all gradients together (Charikar, Chen, Farach-Colton 2002): `size` numbers.

    Each value is added, with a random sign, to one of `size` sums; both depend on the tensor's name alone. Cosines
    between sketches are those between gradients, within (1 - cosine^2) / sqrt(size): 0.0005 near 0.99.
    """
    import torch

    sums = torch.zeros(size, dtype=torch.float64)
    for name, gradient in sorted(gradients.items()):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        place = torch.randint(2 * size, (gradient.numel(),), generator=draw)
        sign = (place % 2 * 2 - 1).double()
        sums.index_add_(0, place // 2, gradient.flatten().double() * sign)
    return [float(f"{value:.6g}") for value in sums.tolist()]


def plain_name(name: str) -> str:
    """A weight's name without what wraps the model: equal for every way."""
    name = name.replace(".default.", ".")
    return name[name.find("layers.") :] if "layers." in name else name


def _number(value: Any) -> float | None:
    """JSON has no NaN: a step that fp16's loss scale skipped has no gradient norm."""
    value = float(value)
    return value if math.isfinite(value) else None


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
