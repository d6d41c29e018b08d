"""The driver's loop: a task for each idle worker while the hours last, and what comes back into the study."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_ft import phases
from fast_ft.errors import InputError
from fast_ft.judge import judging
from fast_ft.prepare import Prepared
from fast_ft.progress import note
from fast_ft.recipe import Recipe
from fast_ft.rundir import RunDir
from fast_ft.sweep import price
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.price import Measured, Work
from fast_ft.sweep.space import Point, Space
from fast_ft.sweep.study import Study
from fast_ft.sweep.trial import Result, Rows, Task, stage_answers
from fast_ft.sweep.workers import Crew

TRIES = 3  #: of one trial, each time on another worker
_UNFIT = 5  #: trials in a row that do not fit the time left, or are no recipes: then the sweep ends
_REPEATS = 20  #: points in a row that were tried already


@dataclass
class Job:
    """A trial from its asking to its telling."""

    trial: Any
    point: Point
    recipe: Recipe
    prepared: Prepared
    training: str  #: digest of what makes the adapter
    stops: list[int]  #: steps at which it is looked at
    priced: float | None = None
    trained: Path | None = None
    stage: int = 0
    tries: int = 1
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return Path(self.recipe.output_dir)


class Driver:
    """Runs trials over a crew. `recipe_at(point)` gives a trial's recipe; `describe(job)` facts to keep of it."""

    def __init__(
        self,
        base: Recipe,
        name: str,
        space: Space,
        study: Study,
        crew: Crew,
        clock: Clock,
        *,
        recipe_at: Callable[[Point], Recipe],
        training_of: Callable[[Recipe, Prepared], str],
        facts_of: Callable[[Job], dict[str, Any]],
        reserve: Callable[[list[Measured]], float],
        changed: Callable[[], None],
    ) -> None:
        assert base.search is not None
        self.base, self.search, self.name, self.space, self.study = base, base.search, name, space, study
        self.crew, self.clock = crew, clock
        self._recipe_at, self._training_of, self._facts_of = recipe_at, training_of, facts_of
        self._reserve, self._changed = reserve, changed
        self._rows = Rows()
        self._points = self._next_points(study.interrupted())
        self._waiting: list[Job] = []
        self._jobs: dict[int, Job] = {}
        self._unreported: list[Job] = []
        self._unfit = self._repeats = 0
        self._seated: set[int] = set()  # workers that have loaded the base
        self.ended = ""  #: why no more trials were begun

    def run(self) -> None:
        """Do trials until there is nothing left to try, or no time."""
        while True:
            for worker in self.crew.idle():
                job = self._next_job(worker)
                if job is None:
                    break
                self._begin(worker, job)
            if not self._jobs:
                break
            while self._unreported:  # while the workers work
                job = self._unreported.pop()
                phases.report_phase(RunDir.at(job.root))
            for worker, result in self.crew.wait(max(0.0, min(1.0, self._left))):
                self._ended(worker, self._jobs.pop(worker), result)
            self.clock.tick()
            if self._left <= 0 and self._jobs:
                self.ended = f"the hours were over with {len(self._jobs)} trials under way, which more hours go on with"
                note(self.ended)
                self.crew.interrupt()
                self._jobs.clear()
                break
        for job in self._unreported:
            phases.report_phase(RunDir.at(job.root))

    @property
    def measured(self) -> list[Measured]:
        """What finished trials took."""
        return [
            Measured(Work(*record["work"]), **record["took"])
            for record in self.study.records()
            if record["state"] == "finished" and not record.get("repeats")
        ]

    @property
    def _left(self) -> float:
        """Seconds left for trials, the end's share taken off."""
        return self.clock.left - self._reserve(self.measured)

    def _fitting(self, seconds: float) -> int:
        """Return how many trials of so many seconds fit the time left, over all workers."""
        return int(max(0.0, self._left) / seconds) * (len(self._jobs) + len(self.crew.idle()))

    def _next_points(self, interrupted: list[Point]) -> Iterator[Point | None]:
        """Yield the points to try: those in flight before, the recipe's own, then the grid's or the sampler's."""
        yield from interrupted
        done = [record["point"] for record in self.study.records() if record["state"] != "not begun"]
        listed = self.space.grid() if self.search.sampler == "grid" else iter([self.space.own])
        yield from (point for point in listed if point not in done and point not in interrupted)
        if self.search.sampler != "grid":
            yield from itertools.repeat(None)

    def _next_job(self, worker: int) -> Job | None:
        """Return the next trial that is worth beginning, or None."""
        while True:
            training = {job.training for job in self._jobs.values()}
            job = next((job for job in self._waiting if job.tries > 1 or job.training not in training), None)
            if job is not None:
                self._waiting.remove(job)
            elif self.ended or len(self._waiting) > len(self.crew.idle()):
                return None
            elif (job := self._ask()) is None:
                continue
            elif job.training in training:
                self._waiting.append(job)  # its adapter is being trained by another
                continue
            if (job := self._priced(job, loaded=worker in self._seated)) is not None:
                return job

    def _over(self, records: list[dict[str, Any]]) -> str:
        """Return why no more trials are asked for, or ""."""
        counted = sum(r["state"] in ("finished", "stopped early") and not r.get("repeats") for r in records)
        if self.search.trials is not None and counted + len(self._jobs) + len(self._waiting) >= self.search.trials:
            return "all trials were made"
        if self._unfit >= _UNFIT:
            return "no trial that fits the time left was found"
        return "the space is used up" if self._repeats >= _REPEATS else ""

    def _ask(self) -> Job | None:
        """Ask the study for a trial; None where it is no recipe, one whose value is known, or none (`ended` says)."""
        records = self.study.records()
        if over := self._over(records):
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
        root = str(recipe.output_dir)
        known = next((r for r in records if r.get("folder") == root and r["state"] == "finished"), None)
        if known is not None or root in {str(job.root) for job in self._jobs.values()}:
            self._repeats += 1
            if known is None:
                self.study.fail(trial, "the same as a trial under way", state="repeat")
            else:
                self.study.finish(trial, known["value"], repeats=known["number"], folder=root)
            return None
        self._repeats = 0
        ends = list(itertools.accumulate(len(job.batches) for job in prepared.jobs(recipe.train, recipe.seed)))
        stops = [] if self.search.pruner == "none" else ends[:-1]
        return Job(trial, point, recipe, prepared, self._training_of(recipe, prepared), stops)

    def _priced(self, job: Job, *, loaded: bool) -> Job | None:
        """Price a trial; None where it does not fit the time left, which is then noted."""
        donors = (r for r in self.study.records() if r.get("training") == job.training and r["value"] is not None)
        job.trained = next((Path(donor["folder"]) for donor in donors), None)
        if job.trained is not None:
            job.stops = []
        measured = self.measured
        work = price.work(job.recipe, job.prepared, trained=job.trained is not None)
        job.priced = price.seconds(work, measured, loaded=loaded)
        if job.priced is None:
            job.priced = price.projected(job.recipe, job.prepared)
        elif job.stops and job.trained is None:
            looks = Work(0, self.search.stage_prompts, job.recipe.generate.max_new_tokens)
            job.priced += len(job.stops) * (price.seconds(looks, measured) or 0.0)
        if job.priced is not None and job.priced * price.MARGIN > self._left:
            self._unfit += 1
            reason = f"{job.priced / 60:.1f} min, where {max(0.0, self._left) / 60:.1f} are left"
            self.study.fail(job.trial, reason, state="not begun", priced=job.priced)
            note(f"trial {job.trial.number} is not begun: {reason}  {shown(job.point)}")
            return None
        self._unfit = 0
        return job

    def _begin(self, worker: int, job: Job) -> None:
        self._jobs[worker] = job
        stop = job.stops[job.stage] if job.stage < len(job.stops) else None
        if job.stage == 0:
            cost = "" if job.priced is None else f"  priced at {job.priced / 60:.1f} min"
            saved = ", trained before" if job.trained else ""
            note(f"trial {job.trial.number} begins{saved}{cost}  {shown(job.point)}")
            if job.priced and not self.measured and self.clock.allowed is not None:
                note(f"by projection some {self._fitting(job.priced)} trials like this one fit; the first will tell")
        self.crew.submit(worker, Task(job.recipe, self.name, job.trained, stop, self.search.stage_prompts))

    def _ended(self, worker: int, job: Job, result: Result | None) -> None:
        """Take what came back from a worker into the study."""
        if result is None:
            self._seated.discard(worker)
            job.tries, job.stage = job.tries + 1, 0
            note(
                f"trial {job.trial.number}: its worker was lost; "
                + ("it is tried again" if job.tries <= TRIES else "given up")
            )
            if job.tries <= TRIES:
                self._waiting.append(job)
            else:
                self.study.fail(job.trial, f"its worker was lost {TRIES} times")
        elif result.stopped:
            return  # it stays open in the journal, and is gone on with
        elif result.problem is not None:
            if job.point == self.space.own:
                raise InputError(f"the recipe itself, as the first trial: {result.problem}")
            note(f"trial {job.trial.number} came to nothing: {result.problem}")
            self.study.fail(job.trial, result.problem)
        else:
            for key, value in result.seconds.items():
                job.spent[key] = job.spent.get(key, 0.0) + value
            if job.stage < len(job.stops):
                self._stage_ended(worker, job)
            else:
                self._finished(worker, job, result)
        self._changed()

    def _stage_ended(self, worker: int, job: Job) -> None:
        """Judge the answers at a stage's end; go on, or give the trial up."""
        at = RunDir(stage_answers(RunDir(job.root), job.stops[job.stage]).parent)
        value = self._value(at, job)[0]
        job.stage += 1
        if self.study.hopeless(job.trial, value, job.stage):
            note(f"trial {job.trial.number} is stopped after stage {job.stage} of {len(job.stops) + 1}: {value:.3f}")
            self.study.prune(job.trial, folder=str(job.root), seconds=job.spent, minutes=self.clock.used / 60,
                             so_far=value, **self._facts_of(job))  # fmt: skip
        else:
            self._begin(worker, job)

    def _finished(self, worker: int, job: Job, result: Result) -> None:
        folder = RunDir.at(job.root)
        value, scores = self._value(folder, job)
        manifest = folder.manifest()
        done = manifest["phases"]["generate"]
        work = price.work(job.recipe, job.prepared, trained=job.trained is not None)
        took = {
            "steps": job.spent.get("steps", 0.0), "answers": done["decoding_seconds"], "all": job.spent["all"],
            "load": job.spent.get("load", 0.0),
        }  # fmt: skip
        self._seated.add(worker)
        if len(job.stops):
            self.study.hopeless(job.trial, value, job.stage + 1)  # so that Hyperband knows the last stage
        self.study.finish(
            job.trial, value, folder=str(job.root), training=job.training, scores=scores, priced=job.priced,
            seconds=job.spent, times=result.times, minutes=self.clock.used / 60, worker=worker,
            trained_in=str(job.trained) if job.trained else None,
            work=[work.tokens, work.prompts, work.max_new_tokens], took=took, **self._facts_of(job),
        )  # fmt: skip
        self._unreported.append(job)
        finished = sum(r["value"] is not None and not r.get("repeats") for r in self.study.records())
        more = ""
        if self.clock.allowed is not None and (each := price.seconds(work, self.measured)):
            more = f"; {self._fitting(each)} more like it fit"
        note(
            f"trial {job.trial.number}: {value:.3f} in {job.spent['all'] / 60:.1f} min; {finished} done, "
            f"{self.clock.used / 60:.1f} min used{more}"
        )

    def _value(self, folder: RunDir, job: Job) -> tuple[float, dict[str, float | None]]:
        """Judge a folder's answers and return their mean and each prompt's score, by the sweep's objective."""
        content = json.loads(folder.scores.read_text(encoding="utf-8")) if folder.scores.is_file() else None
        if content is None:
            group = judging.groups(job.prepared.prompts)
            if folder.manifest_path.is_file():
                phases.judge_phase(folder, job.recipe, job.prepared.prompts)
            else:
                judging.judge_run(folder, job.recipe.judge, group, seed=job.recipe.seed)
            content = json.loads(folder.scores.read_text(encoding="utf-8"))
        measure = "score" if self.search.objective in ("judge", "exact_match") else self.search.objective
        scores = {
            key: None if each["score"] is None else float(each[measure]) for key, each in content["prompts"].items()
        }
        there = [score for score in scores.values() if score is not None]
        if not there:
            raise InputError(f"{folder.scores}: the judge gave no score")
        return sum(there) / len(there), scores


def shown(point: Point) -> str:
    """Return a point in words: lora.r 16, train.learning_rate 0.0008."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )
