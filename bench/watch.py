"""What a way of training does, seen from outside: the same callback on every trainer.

A step has ended when the card has done what the trainer launched for it. Seconds are between these ends, by the card's
own clock: a trainer that launches the next step first learns late that one has ended. On a CPU it has ended when the
trainer knows its numbers. Watching waits for nothing, but for the first step and its gradients, and what that takes is
left out. What the steps trained on is described at the end.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

from fast_ft.data.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import Trainer

_Given = ParamSpec("_Given")
SKETCH = 2048  #: numbers that stand for a gradient of millions


def _one_thread(work: Callable[_Given, None]) -> Callable[_Given, None]:
    """Do small work on the CPU in one thread: beside other processes, threads would wait for each other each time."""

    @functools.wraps(work)
    def _alone(*given: _Given.args, **named: _Given.kwargs) -> None:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            work(*given, **named)
        finally:
            torch.set_num_threads(threads)

    return _alone


@dataclass(frozen=True)
class _Launched:
    """A step that was launched: whether it was skipped, on what it trained, and what tells when the card has done it.

    `paused` are the seconds that were left out before it was launched.
    """

    skipped: bool
    inputs: list[tuple[Tensor, Tensor]]
    end: torch.cuda.Event | None
    paused: float


class Watch:
    """Records of one run. `stamps` are seconds since the command was given; `steps` has a dict for each step."""

    def __init__(self, started: float) -> None:
        self._started = started  # time.monotonic() of the parent: one clock for all processes of a machine
        self._paused = self._last = 0.0
        self._before: _Launched | None = None  #: the step that ended last; before the first, where training began
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._launched: list[_Launched] = []  # steps that have not yet ended
        self._ended: list[list[tuple[Tensor, Tensor]]] = []  # what each step trained on
        self.stamps: dict[str, float] = {}
        self.steps: list[dict[str, Any]] = []
        self.gradient: dict[str, Any] = {}
        self._gradients: dict[str, Tensor] = {}
        self.settled: Callable[[list[dict[str, Any]]], bool] = lambda _: False  #: whether the steps so far are enough

    def leave_out(self, work: Callable[[], None]) -> None:
        """Do something that is no part of what is measured: its seconds count nowhere."""
        started = time.monotonic()
        work()
        self._paused += time.monotonic() - started

    def stamp(self, name: str) -> float:
        """Note the time under this name, once; return it."""
        now = self._now()
        self.stamps.setdefault(name, round(now, 4))
        return now

    def saw(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """Keep a batch as the model gets it: at each token, the token to be learnt next (IGNORE_INDEX: none).

        Both have one shape, [rows, tokens] or [tokens].
        """
        self._inputs.append((tokens_BT, targets_BT))

    def forget(self) -> None:
        """Drop the batches of a step that is done again."""
        self._inputs.clear()

    def attach(self, trainer: Trainer, *, stop_after: int) -> None:
        """Watch a trainer that is not yet running; stop it after `stop_after` steps, its schedule left as it is."""
        from bench.watch_callback import WatchCallback

        trainer.add_callback(WatchCallback(self, trainer, stop_after))

    def train_began(self) -> None:
        """Note when training began."""
        _wait()
        self.stamp("train_begin")

    def step_began(self) -> None:
        """Note when the first step began; an accumulated step begins more than once."""
        if not self.steps and "first_step_begin" not in self.stamps:
            _wait()
            self._last = self.stamp("first_step_begin")
            self._before = _Launched(False, [], _mark(), self._paused)

    def gradients_are_there(self, model: nn.Module) -> None:
        """Keep the first finite gradients."""
        if not self.gradient:
            self._pause(lambda: self._take_gradients(model))

    @property
    def launched(self) -> int:
        """How many steps were launched so far."""
        return len(self.steps) + len(self._launched)

    def step_launched(self, *, skipped: bool) -> None:
        """Note that a step was launched, and on what. A skipped step is one that fp16's loss scale gave up."""
        self._launched.append(_Launched(skipped, self._inputs, _mark(), self._paused))
        self._inputs = []

    def logged(self, loss: float, grad_norm: float) -> None:
        """Record the seconds of the oldest launched step, whose loss (nats per token) and gradient norm are known."""
        step, before = self._launched.pop(0), self._before
        if step.end is not None:
            step.end.synchronize()
        if not self.steps:
            self.stamp("first_step_end")
        now = self._now()
        seconds = now - self._last
        if step.end is not None and before is not None and before.end is not None:
            seconds = before.end.elapsed_time(step.end) / 1e3 - (step.paused - before.paused)
        facts = {"skipped": step.skipped or not math.isfinite(float(grad_norm))}
        numbers = {"loss": _number(loss), "grad_norm": _number(grad_norm)}
        self.steps.append({"seconds": round(seconds, 5), **facts, **numbers})
        self._ended.append(step.inputs)
        self._last, self._before = now, step

    @_one_thread
    def finish(self) -> None:
        """Describe what the steps trained on, and reduce the gradients to a sketch: both take their time."""
        for step, inputs in zip(self.steps, self._ended, strict=False):
            step |= described(inputs)
        self._ended.clear()
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
        self.leave_out(work)

    @_one_thread
    def _take_gradients(self, model: nn.Module) -> None:
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


def described(inputs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return what a step's batches hold, each a pair of tokens and targets as `Watch.saw` takes them."""
    pairs = [pair for tokens, targets in inputs for pair in trained_pairs(tokens, targets)]
    return {
        "supervised_tokens": len(pairs),
        "positions": sum(tokens.numel() for tokens, _ in inputs),
        "passes": len(inputs),
        "flat": all(tokens.dim() == 1 or tokens.shape[0] == 1 for tokens, _ in inputs),
        "digest": digest(pairs),
    }


def trained_pairs(tokens_BT: Tensor, targets_BT: Tensor) -> list[int]:
    """Return one number for each trained token: the token before it and itself, however rows are laid out."""
    kept_BT = targets_BT != IGNORE_INDEX
    pairs: list[int] = (tokens_BT[kept_BT].long() * 1_000_003 + targets_BT[kept_BT].long()).tolist()
    return pairs


def digest(pairs: list[int]) -> str:
    """Return the digest of what a step trains on, whatever the order of its rows."""
    return hashlib.sha256(",".join(map(str, sorted(pairs))).encode()).hexdigest()[:16]


def sketch(gradients: dict[str, Tensor], size: int = SKETCH) -> list[float]:
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
    """Return a weight's name without what wraps the model: equal for every way."""
    name = name.replace(".default.", ".")
    return name[name.find("layers.") :] if "layers." in name else name


def _number(value: Any) -> float | None:
    """Return a number for JSON, which has no NaN: a step that fp16's loss scale skipped has no gradient norm."""
    value = float(value)
    return value if math.isfinite(value) else None


def _mark() -> torch.cuda.Event | None:
    """Return an event behind all that the card was given so far; None without a card."""
    import torch

    if not torch.cuda.is_available():
        return None
    from fast_ft.train.launched_step import mark

    return mark()


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
