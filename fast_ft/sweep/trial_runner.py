"""One trial in a worker: an ordinary run of an ordinary recipe, up to its answers, over a base model that stays loaded.

The trial's run folder holds what that of any run holds. The driver judges: the judge's key and replies stay there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Iterator
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.redaction import redacted
from fast_ft.data.prepare import PreparedData
from fast_ft.generate import answers
from fast_ft.pipeline import generate_phase, set_up, train_phase
from fast_ft.pipeline.decoding import decode_plan
from fast_ft.pipeline.opening import opened
from fast_ft.plan import planner
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from fast_ft.sweep.resident_model import ResidentLoader
from fast_ft.sweep.row_cache import RowCache
from fast_ft.sweep.trial_folder import adopt, stage_answers
from fast_ft.sweep.trial_task import TrialResult, TrialTask
from fast_ft.train import checkpoints


class TrialRunner:
    """Does tasks one after another, and keeps what they share: base model, rows, and what the card can do."""

    def __init__(self) -> None:
        self.kept = ResidentLoader()
        self.rows = RowCache()
        self._card: list[Any] = []  #: what the card was before the base was on it; on a CPU [None]
        self._seconds: dict[str, float] = {}

    def run(self, task: TrialTask) -> TrialResult:
        """Do a task, or go on with it, and return what became of it. Errors and bugs are results too."""
        started, loading = time.monotonic(), self.kept.seconds
        self._seconds = {}
        times: dict[str, float] = {}
        try:
            count = self._run(task, times)
        except (InputError, BudgetMissed) as error:
            return TrialResult(problem=str(error))
        except Exception as error:
            problem = redacted(f"a bug: {type(error).__name__}: {error}")
            return TrialResult(problem=problem, traceback=redacted(traceback.format_exc()))
        except KeyboardInterrupt:
            return TrialResult(stopped=True)
        self._seconds |= {"load": self.kept.seconds - loading, "all": time.monotonic() - started}
        return TrialResult(seconds=self._seconds, times=times, prompts=count)

    def _run(self, task: TrialTask, times: dict[str, float]) -> int:
        recipe = task.recipe
        prepared = self.rows.prepared(recipe)
        with opened(recipe, task.name, prepared, judged=False) as folder:
            self._seconds["steps_before"] = _seconds_kept(folder)
            if folder.done("train") is None and task.trained is not None:
                adopt(folder, RunDir.at(task.trained))
            if folder.done("train") is None:
                self._train(folder, task, prepared, times)
            if folder.done("train") is None:
                return self._answer_some(folder, task, prepared)
            if prepared.prompts and folder.done("generate") is None:
                with self._timed("answer"):
                    self._settle(folder, recipe, prepared)
                    generate_phase.generate_phase(folder, recipe, prepared, maker=self.kept.use(recipe))
            return len(prepared.prompts)

    def _train(self, folder: RunDir, task: TrialTask, prepared: PreparedData, times: dict[str, float]) -> None:
        with self._timed("train"):
            self._settle(folder, task.recipe, prepared)
            try:
                train_phase.train_phase(
                    folder, task.recipe, prepared, task.stop_after, maker=self.kept.use(task.recipe)
                )
            except BudgetMissed as missed:  # the recipe's own budget ended it, as it would a run
                if folder.done("train") is None:
                    raise InputError(str(missed)) from missed
        steps = sum(_step_seconds(folder)) - self._seconds["steps_before"]
        # log.jsonl is written as steps end: its last write is the end of training
        times["trained"] = folder.log.stat().st_mtime
        times["first_step"] = times["trained"] - steps
        self._seconds["steps"] = steps

    def _settle(self, folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
        """Settle the plan for the card as it was before the base was loaded, as a fresh process would.

        The card is looked at before the worker's first trial, whether that has a plan already or not.
        """
        maker = self.kept.use(recipe)
        if not self._card:
            self._card = [planner.card_here()]
        set_up.settle_plan(folder, recipe, prepared, maker.name, self._card[0])

    def _answer_some(self, folder: RunDir, task: TrialTask, prepared: PreparedData) -> int:
        """Answer the first prompts with the adapter so far."""
        recipe, prompts = task.recipe, prepared.prompts[: task.prompts]
        with self._timed("answer"):
            loaded = self.kept.use(recipe).for_generation(folder.taste / "adapter")
            partial = folder.taste / "partial.jsonl"
            partial.unlink(missing_ok=True)
            settled = set_up.settle_plan(
                folder, recipe, prepared, self.kept.name, set_up.card_to_plan_for(folder, recipe)
            )
            plan = decode_plan(recipe, prepared, settled)
            answering = answers.Task(recipe.seed, partial, title="answers so far")
            result = answers.generate(loaded, prepared.encoder, prompts, recipe.generate, plan, answering)
        path = stage_answers(folder, task.stop_after or 0)
        atomic_files.write_json(path, answers.predictions(prompts, result.answers))
        shutil.rmtree(folder.taste, ignore_errors=True)
        return len(prompts)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent within to an entry; no Stopwatch, since train and answer may hold load."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started


def _seconds_kept(folder: RunDir) -> float:
    """Return the seconds of a trial's own steps that it does not take again."""
    train, last = folder.done("train"), checkpoints.newest(folder.checkpoints)
    if train is not None:
        return 0.0 if "trained_in" in train else float(train["training_seconds"])
    return sum(_step_seconds(folder)[: checkpoints.step(last) if last is not None else 0])


def _step_seconds(folder: RunDir) -> list[float]:
    """Return the seconds of each step in a trial's log."""
    lines = folder.log.read_text(encoding="utf-8").splitlines() if folder.log.is_file() else []
    return [json.loads(line)["seconds"] for line in lines]
