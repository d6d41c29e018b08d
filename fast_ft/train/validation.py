"""When training measures the validation loss, and which weights it keeps for the least one."""

from __future__ import annotations

import math
import time
from functools import partial

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.train import state
from fast_ft.train.forward_backward import Passes
from fast_ft.train.stopping import Stopping
from fast_ft.train.task import TrainCallbacks, TrainTask
from fast_ft.train.validation_loss import ValidationLoss


class Validation:
    """Measures a task's validation loss behind its steps. The time that it takes is counted by `stopping`."""

    def __init__(self, passes: Passes, task: TrainTask, callbacks: TrainCallbacks, stopping: Stopping) -> None:
        self.loss = ValidationLoss(passes, task.validation)
        self.is_on = bool(task.validation)  #: there are rows, and each of them fits into memory
        self._after, self._keeps_best = task.measurements.after, task.section.load_best
        self._model, self._callbacks, self._stopping = passes.model, callbacks, stopping

    def is_due(self, at: state.TrainState) -> bool:
        """Return whether the loss is due after the step that `at` stands behind."""
        return self.is_on and (at.global_step in self._after or at.global_step == at.stop_at)

    def measure(self, at: state.TrainState) -> tuple[dict[str, float], list[str]]:
        """Measure the loss, and note in `at` where it is the least so far.

        Return what the step's line says of it, and what the manifest has to know. Where a row does not fit into memory,
        training goes on and measures no more.
        """
        began, found, problems = time.monotonic(), {}, []
        try:
            found["validation_loss"] = loss = self.loss.measure()
        except InputError as error:
            self.is_on = False
            problems.append(f"the validation loss is not measured from step {at.global_step} on: {error}")
            note(f"warning: {problems[0]}")
        else:
            if math.isfinite(loss) and (at.best_loss is None or loss < at.best_loss):
                problems += self._keep(at, loss)
        found["validation_seconds"] = round(time.monotonic() - began, 4)
        self._stopping.count_measurement(at, is_last=not self.is_on)
        return found, problems

    def _keep(self, at: state.TrainState, loss: float) -> list[str]:
        """Note that this loss is the least, and keep the weights where train.load_best asks; say what went wrong."""
        write = partial(state.save_weights, model=self._model)
        problem = self._callbacks.on_best(at.global_step, write) if self._keeps_best else None
        if problem:
            return [problem]
        at.best_step, at.best_loss = at.global_step, loss
        return []
