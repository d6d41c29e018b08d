"""Which trial comes next: asked of the study, made a recipe, priced; what does not fit the hours is not begun."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import Prepared
from fast_ft.recipe.schema import Recipe
from fast_ft.sweep import cost_estimate, inputs
from fast_ft.sweep.cost_estimate import Work
from fast_ft.sweep.job import TrialJob, shown
from fast_ft.sweep.search_space import Point, Space
from fast_ft.sweep.study import Study
from fast_ft.sweep.trial_runner import RowCache, is_trained

_UNFIT = 5  #: trials in a row that do not fit the time left, or are no recipes: then the sweep ends
_REPEATS = 20  #: points in a row that were tried already


class TrialQueue:
    """Trials to begin. `recipe_at(point)` gives a trial's recipe, `training_of` a digest of what makes its adapter."""

    def __init__(
        self,
        base: Recipe,
        space: Space,
        study: Study,
        *,
        recipe_at: Callable[[Point], Recipe],
        training_of: Callable[[Recipe, Prepared], str],
    ) -> None:
        assert base.search is not None
        self.search, self.space, self.study = base.search, space, study
        self._recipe_at, self._training_of = recipe_at, training_of
        self._rows = RowCache()
        self._points = self._next_points(study.interrupted())
        self._waiting: list[TrialJob] = []
        self._unfit = self._repeats = 0
        self.ended = ""  #: why no more trials are begun

    def again(self, job: TrialJob) -> None:
        """Take back a trial whose worker was lost."""
        self._waiting.append(job)

    def _next_points(self, interrupted: list[Point]) -> Iterator[Point | None]:
        """Yield the points to try: those in flight before, the recipe's own, then the grid's or the sampler's."""
        yield from interrupted
        done = [record["point"] for record in self.study.records() if record["state"] != "not begun"]
        listed = self.space.grid() if self.search.sampler == "grid" else iter([self.space.own])
        yield from (point for point in listed if point not in done and point not in interrupted)
        if self.search.sampler != "grid":
            yield from itertools.repeat(None)

    def next(self, running: Collection[TrialJob], idle: int, left: float, *, loaded: bool) -> TrialJob | None:
        """Return the next trial that is worth beginning, or None.

        `running`: those under way; `idle`: workers that are not; `left`: seconds; `loaded`: the worker has the base.
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
        """Ask the study for a trial; None where it is no recipe, one whose value is known, or none (`ended` says)."""
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
            recipe = self._recipe_at(point)
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
        ends = list(itertools.accumulate(len(job.batches) for job in prepared.jobs(recipe.train, recipe.seed)))
        stops = [] if self.search.pruner == "none" else ends[:-1]
        return TrialJob(trial, point, recipe, prepared, self._training_of(recipe, prepared), stops)

    def _priced(self, job: TrialJob, left: float, *, loaded: bool) -> TrialJob | None:
        """Price a trial; None where it does not fit the time left, which is then noted."""
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
