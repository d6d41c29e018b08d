"""One trial in a worker: an ordinary run of an ordinary recipe, up to its answers, over a base model that stays loaded.

The run folder then holds what any run's holds. Judging is the driver's: the judge's key and its replies stay there.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.redaction import redacted
from fast_ft.data import contamination, curriculum
from fast_ft.data.examples import Prompt
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.generate import answers
from fast_ft.pipeline import generate_phase, phases, train_phase
from fast_ft.pipeline.adapter_loading import decode_plan
from fast_ft.pipeline.run import opened
from fast_ft.plan import planner
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from fast_ft.sweep.resident_model import ResidentLoader


@dataclass(frozen=True)
class Task:
    """What a worker does next: train `recipe` (its output_dir is the run folder) and answer its data.test.

    trained: a run folder whose training was the same. stop_after: train up to that step only, and answer the first
    `prompts` into stage-answers/<step>/pred.json.
    """

    recipe: Recipe
    name: str  #: the recipe file's
    trained: Path | None = None
    stop_after: int | None = None
    prompts: int = 0

    @property
    def root(self) -> Path:
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class Result:
    """What became of a task. `problem`: why there is no answer, in a sentence; `stopped`: it was interrupted.

    traceback: of a bug; "" where the recipe or the machine was at fault.
    seconds: {load, steps, train, answer, all}; train and answer may hold load. times: {first_step, trained}, in seconds
    since 1970.
    """

    problem: str | None = None
    traceback: str = ""
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    prompts: int = 0


class Runner:
    """Does tasks one after another. What they share is kept: base model, rows, and what the card was found to do."""

    def __init__(self) -> None:
        self.kept = ResidentLoader()
        self.rows = Rows()
        self._card: list[Any] = []  #: what the card was before the base was on it; on a CPU [None]
        self._seconds: dict[str, float] = {}

    def run(self, task: Task) -> Result:
        """Do a task, or go on with it, and say what became of it. What the recipe or a bug did is a Result too."""
        started, loading = time.monotonic(), self.kept.seconds
        self._seconds = {}
        times: dict[str, float] = {}
        try:
            count = self._run(task, times)
        except (InputError, BudgetMissed) as error:
            return Result(problem=str(error))
        except Exception as error:
            problem = redacted(f"a bug: {type(error).__name__}: {error}")
            return Result(problem=problem, traceback=redacted(traceback.format_exc()))
        except KeyboardInterrupt:
            return Result(stopped=True)
        self._seconds |= {"load": self.kept.seconds - loading, "all": time.monotonic() - started}
        return Result(seconds=self._seconds, times=times, prompts=count)

    def _run(self, task: Task, times: dict[str, float]) -> int:
        recipe = task.recipe
        prepared = self.rows.prepared(recipe)
        with opened(recipe, task.name, prepared, judged=False) as folder:
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

    def _train(self, folder: RunDir, task: Task, prepared: PreparedData, times: dict[str, float]) -> None:
        before = _lines(folder)
        with self._timed("train"):
            self._settle(folder, task.recipe, prepared)
            try:
                train_phase.train_phase(
                    folder, task.recipe, prepared, task.stop_after, maker=self.kept.use(task.recipe)
                )
            except BudgetMissed as missed:  # the recipe's own budget ended it, as it would a run
                if folder.done("train") is None:
                    raise InputError(str(missed)) from missed
        steps = [json.loads(line)["seconds"] for line in _lines(folder)[len(before) :]]
        # log.jsonl is written as steps end: its last write is the end of training
        times["trained"] = folder.log.stat().st_mtime
        times["first_step"] = times["trained"] - sum(steps)
        self._seconds["steps"] = sum(steps)

    def _settle(self, folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
        """Settle the plan for the card as it was before the base was loaded, as a fresh process would."""
        maker = self.kept.use(recipe)
        if folder.plan.is_file():
            return
        if not self._card:
            self._card = [planner.card_here()]
        config = phases.model_config(recipe)
        phases.keep_plan(folder, planner.settle(recipe, prepared, config, backend=maker.name, card=self._card[0]))

    def _answer_some(self, folder: RunDir, task: Task, prepared: PreparedData) -> int:
        """Answer the first prompts with the adapter so far."""
        recipe, prompts = task.recipe, prepared.prompts[: task.prompts]
        with self._timed("answer"):
            loaded = self.kept.use(recipe).for_generation(folder.taste / "adapter")
            partial = folder.taste / "partial.jsonl"
            partial.unlink(missing_ok=True)
            settled = phases.settle_plan(folder, recipe, prepared, self.kept.name)
            plan = decode_plan(recipe, settled)
            answering = answers.Task(recipe.seed, partial, title="answers so far")
            result = answers.generate(loaded, prepared.encoder, prompts, recipe.generate, plan, answering)
        write_answers(stage_answers(folder, task.stop_after or 0), prompts, result)
        shutil.rmtree(folder.taste, ignore_errors=True)
        return len(prompts)

    def _timed(self, name: str) -> _Timed:
        return _Timed(self._seconds, name)


class Rows:
    """Rows tokenised once: trials that differ in stages, training or decoding share them."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._prepared: PreparedData | None = None

    def prepared(self, recipe: Recipe) -> PreparedData:
        """Return what `prepare` returns, from the trial before's rows where they are the same."""
        needed = curriculum.metrics_needed(recipe.curriculum)
        parts = [recipe.model, recipe.data, recipe.select, recipe.seed, recipe.rules, needed]
        key = repr(parts)
        if key != self._key or self._prepared is None:
            self._prepared, self._key = prepare(recipe), key
            return self._prepared
        limit = policy_ntu_hw5.max_train_rows(recipe)
        stages = curriculum.build_stages(recipe.curriculum, recipe.train, self._prepared.selection, limit)
        found = replace(self._prepared, stages=stages)
        return replace(found, leakage=contamination.certificate(found.examples, found.prompts))


class _Timed:
    """Adds the seconds spent inside to an entry."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.monotonic() - self._started


def stage_answers(folder: RunDir, step: int) -> Path:
    """Return where the answers of a trial that stands at `step` are."""
    return folder.root / "stage-answers" / str(step) / "pred.json"


def write_answers(path: Path, prompts: list[Prompt], result: answers.Generation) -> None:
    atomic_files.write_json(path, answers.predictions(prompts, result.answers))


def is_trained(folder: Path) -> bool:
    """Tell whether a run folder, which a user may have tidied up, still holds its adapter."""
    return (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "manifest.json").is_file()


def adopt(folder: RunDir, other: RunDir) -> None:
    """Take another run's training as this one's: adapter, log and facts. Its recipe trains the same."""
    with atomic_files.replace_folder(folder.adapter) as target:
        shutil.copytree(other.adapter, target, dirs_exist_ok=True)
    for name in ("log.jsonl", "loss.png"):
        if (other.root / name).is_file():
            atomic_files.write_bytes(folder.root / name, (other.root / name).read_bytes())
    theirs = other.manifest()
    adapter = {"adapter": theirs["digests"]["adapter"]}
    folder.update(model=theirs.get("model"), digests=folder.manifest()["digests"] | adapter)
    facts = {key: value for key, value in theirs["phases"]["train"].items() if key not in ("seconds", "finished")}
    folder.finish("train", 0.0, **facts | {"training_seconds": 0.0, "trained_in": str(other.root)})


def _lines(folder: RunDir) -> list[str]:
    return folder.log.read_text(encoding="utf-8").splitlines() if folder.log.is_file() else []
