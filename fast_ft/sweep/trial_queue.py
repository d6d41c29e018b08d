"""Which trial comes next: the study is asked, a recipe made and priced; what does not fit the hours is not begun."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import PreparedData
from fast_ft.recipe.schema import Recipe
from fast_ft.sweep import cost_estimate, inputs
from fast_ft.sweep.cost_estimate import Work
from fast_ft.sweep.row_cache import RowCache
from fast_ft.sweep.search_space import Point, SearchSpace
from fast_ft.sweep.study import Study
from fast_ft.sweep.trial_folder import is_trained
from fast_ft.sweep.trial_recipes import TrialRecipes

if TYPE_CHECKING:
    from optuna.trial import Trial

_UNFIT = 5  #: trials in a row that do not fit the time left, or are no recipes: then the sweep ends
_REPEATS = 20  #: points in a row that were tried already


@dataclass
class TrialJob:
    """A trial on its way: what the driver knows of it from when the study is asked until the study is told."""

    trial: Trial
    point: Point
    recipe: Recipe
    prepared: PreparedData
    training: str  #: digest of what makes the adapter
    stops: list[int]  #: steps at which it is looked at
    priced: float | None = None  #: seconds that it will take, where that is known
    trained: Path | None = None  #: a run folder whose training was the same
    stage: int = 0
    tries: int = 1
    spent: dict[str, float] = field(default_factory=dict)  #: seconds, by name, as in TrialResult

    @property
    def root(self) -> Path:
        """The trial's run folder."""
        return Path(self.recipe.output_dir)


def shown(point: Point) -> str:
    """Return a point in words: lora.r 16, train.learning_rate 0.0008."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )


class TrialQueue:
    """Trials to begin. `ended` says why no more of them are begun, once that is so."""

    def __init__(self, recipes: TrialRecipes, space: SearchSpace, study: Study) -> None:
        self.recipes, self.space, self.study = recipes, space, study
        self.search = recipes.search
        self.ended = ""
        self._rows = RowCache()
        self._points = self._next_points(study.interrupted())
        self._waiting: list[TrialJob] = []
        self._unfit = self._repeats = 0

    def again(self, job: TrialJob) -> None:
        """Take back a trial whose worker was lost."""
        self._waiting.append(job)

    def _next_points(self, interrupted: list[Point]) -> Iterator[Point | None]:
        """Yield the points to try: the interrupted ones, the recipe's own, then the grid's or the sampler's (None)."""
        yield from interrupted
        done = [record["point"] for record in self.study.records() if record["state"] != "not begun"]
        listed = self.space.grid() if self.search.sampler == "grid" else iter([self.space.own])
        yield from (point for point in listed if point not in done and point not in interrupted)
        if self.search.sampler != "grid":
            yield from itertools.repeat(None)

    def next(self, running: Collection[TrialJob], idle: int, left: float, *, loaded: bool) -> TrialJob | None:
        """Return the next trial that is worth beginning, or None.

        running: trials under way. idle: how many workers have none. left: seconds. loaded: the worker has the base.
        """
        while True:
            training = {job.training for job in running}
            job = next((job for job in self._waiting if job.tries > 1 or job.training not in training), None)
            if job is not None:
                self._waiting.remove(job)
            elif self.ended or len(self._waiting) > idle:
                return None
            elif (job := self._ask(running)) is None:
                continue
            elif job.training in training:
                self._waiting.append(job)  # its adapter is being trained by another
                continue
            if (job := self._priced(job, left, loaded=loaded)) is not None:
                return job

    def _over(self, records: list[dict[str, Any]], running: Collection[TrialJob]) -> str:
        """Return why no more trials are asked for, or ""."""
        counted = sum(r["state"] in ("finished", "stopped early") and not r.get("repeats") for r in records)
        if self.search.trials is not None and counted + len(running) + len(self._waiting) >= self.search.trials:
            return "all trials were made"
        if self._unfit >= _UNFIT:
            return "no trial that fits the time left was found"
        return "the space is used up" if self._repeats >= _REPEATS else ""

    def _ask(self, running: Collection[TrialJob]) -> TrialJob | None:
        """Ask the study for a trial.

        None where its point is no recipe, where its value is known already, and where there are no more (see `ended`).
        """
        records = self.study.records()
        if over := self._over(records, running):
            self.ended = over
            return None
        try:
            trial = self.study.ask(next(self._points))
        except StopIteration:
            self.ended = "every point of the grid was tried"
            return None
        point = dict(trial.params)
        own = point == self.space.own
        try:
            recipe = self.recipes.at(point)
            prepared = self._rows.prepared(recipe)
        except InputError as error:
            if own:
                raise
            self._unfit += 1
            self.study.fail(trial, str(error), state="no recipe")
            return None
        self.study.same_inputs(inputs.of_trial(recipe))
        root = str(recipe.output_dir)
        known = next((r for r in records if r.get("folder") == root and r["state"] == "finished"), None)
        if known is not None or root in {str(job.root) for job in running}:
            self._repeats += 1
            if known is None:
                self.study.fail(trial, "the same as a trial under way", state="repeat")
            else:
                self.study.finish(trial, known["value"], repeats=known["number"], folder=root)
            return None
        self._repeats = 0
        ends = list(itertools.accumulate(len(job.batches) for job in prepared.jobs))
        stops = [] if self.search.pruner == "none" else ends[:-1]
        return TrialJob(trial, point, recipe, prepared, inputs.training_digest(recipe, prepared), stops)

    def _priced(self, job: TrialJob, left: float, *, loaded: bool) -> TrialJob | None:
        """Price a trial and return it. None, and a note, where it does not fit the time left."""
        same = (r for r in self.study.records() if r.get("training") == job.training and r["value"] is not None)
        job.trained = next((Path(record["folder"]) for record in same if is_trained(Path(record["folder"]))), None)
        if job.trained is not None:
            job.stops = []
        measured = cost_estimate.measured(self.study.records())
        work = cost_estimate.work(job.recipe, job.prepared, trained=job.trained is not None)
        job.priced = cost_estimate.seconds(work, measured, loaded=loaded)
        if job.priced is None:
            job.priced = cost_estimate.projected(job.recipe, job.prepared)
        elif job.stops and job.trained is None:
            looks = Work(0, self.search.stage_prompts, job.recipe.generate.max_new_tokens)
            job.priced += len(job.stops) * (cost_estimate.seconds(looks, measured) or 0.0)
        if job.priced is not None and job.priced * cost_estimate.MARGIN > left:
            self._unfit += 1
            reason = f"{job.priced / 60:.1f} min, where {max(0.0, left) / 60:.1f} are left"
            self.study.fail(job.trial, reason, state="not begun", priced=job.priced)
            note(f"trial {job.trial.number} is not begun: {reason}  {shown(job.point)}")
            return None
        self._unfit = 0
        return job
