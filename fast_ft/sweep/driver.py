"""The driver's loop: each idle worker gets a task while the hours last, and what comes back goes into the study."""

from __future__ import annotations

import json
from typing import Any

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.judge import reference_judge
from fast_ft.pipeline import judge_phase
from fast_ft.report.write import try_report
from fast_ft.run.folder import RunDir
from fast_ft.sweep import cost_estimate, inputs
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.cost_estimate import Measured
from fast_ft.sweep.files import SweepFile
from fast_ft.sweep.trial_folder import stage_answers
from fast_ft.sweep.trial_queue import TrialJob, TrialQueue, shown
from fast_ft.sweep.trial_recipes import TrialRecipes
from fast_ft.sweep.trial_task import TrialResult, TrialTask
from fast_ft.sweep.workers import WorkerPool

TRIES = 3  #: of one trial, each time on another worker


class Driver:
    """Runs a queue's trials over workers, into its study; sweep.json is written as trials end."""

    def __init__(
        self, recipes: TrialRecipes, queue: TrialQueue, workers: WorkerPool, clock: Clock, file: SweepFile
    ) -> None:
        self.recipes, self.queue, self.workers, self.clock, self.file = recipes, queue, workers, clock, file
        self.search, self.space, self.study = queue.search, queue.space, queue.study
        self._jobs: dict[int, TrialJob] = {}
        self._unreported: list[TrialJob] = []
        self._seated: set[int] = set()  # workers that have loaded the base

    def run(self) -> None:
        """Do trials until there is nothing left to try, or no time."""
        self._begin_trials()
        if any(job.recipe.judge.kind == "reference" for job in self._jobs.values()):
            reference_judge.ReferenceJudge()  # its libraries are imported while the workers load, not between trials
        while self._jobs:
            self._write_reports()  # while the workers work
            for worker, result in self.workers.wait(max(0.0, min(1.0, self._left))):
                self._ended(worker, self._jobs.pop(worker), result)
            self.clock.tick()
            if self._left <= 0 and self._jobs:
                self._stop()
            else:
                self._begin_trials()
        self._write_reports()

    def _begin_trials(self) -> None:
        """Give each idle worker a trial, as long as there are any."""
        for worker in self.workers.idle():
            running, idle = list(self._jobs.values()), len(self.workers.idle())
            job = self.queue.next(running, idle, self._left, loaded=worker in self._seated)
            if job is None:
                break
            self._begin(worker, job)

    def _stop(self) -> None:
        """End the trials under way, since the hours are over; what they saved is kept."""
        under_way = f"{counted(len(self._jobs), 'trial')} under way, which more hours go on with"
        self.queue.ended = f"the hours were over with {under_way}"
        note(self.queue.ended)
        self.workers.interrupt()
        self._jobs.clear()

    def _write_reports(self) -> None:
        while self._unreported:
            job = self._unreported.pop()
            try_report(RunDir.at(job.root))

    @property
    def _measured(self) -> list[Measured]:
        return cost_estimate.measured(self.study.records())

    @property
    def _left(self) -> float:
        """Seconds left for trials, without those that the end of the sweep needs."""
        longest = self.recipes.recipe.generate.max_new_tokens
        return self.clock.left - cost_estimate.reserve(self.recipes.asked, longest, self._measured)

    def _fitting(self, seconds: float) -> int:
        """Return how many trials of `seconds` each fit the time left, over all workers."""
        return int(max(0.0, self._left) / seconds) * (len(self._jobs) + len(self.workers.idle()))

    def _begin(self, worker: int, job: TrialJob) -> None:
        self._jobs[worker] = job
        stop = job.stops[job.stage] if job.stage < len(job.stops) else None
        if job.stage == 0:
            cost = "" if job.priced is None else f"  priced at {job.priced / 60:.1f} min"
            saved = ", trained before" if job.trained else ""
            note(f"trial {job.trial.number} begins{saved}{cost}  {shown(job.point)}")
            if job.priced and not self._measured and self.clock.allowed is not None:
                note(f"the projection has time for about {counted(self._fitting(job.priced), 'trial')} like this one")
        task = TrialTask(job.recipe, self.recipes.name, job.trained, stop, self.search.stage_prompts)
        self.workers.submit(worker, task)

    def _ended(self, worker: int, job: TrialJob, result: TrialResult | None) -> None:
        """Take what came back from a worker into the study."""
        if result is None:
            self._seated.discard(worker)
            job.tries, job.stage = job.tries + 1, 0
            note(
                f"trial {job.trial.number}: its worker was lost; "
                + ("it is tried again" if job.tries <= TRIES else "given up")
            )
            if job.tries <= TRIES:
                self.queue.again(job)
            else:
                self.study.fail(job.trial, f"its worker was lost {TRIES} times")
        elif result.stopped:
            return  # it stays open in the journal, and is gone on with
        elif result.problem is not None:
            problem = self._kept(job, result) if result.traceback else result.problem
            if job.point == self.space.own:
                said = f"the recipe itself, as the first trial: {problem}"
                raise RuntimeError(f"{said}\n{result.traceback}") if result.traceback else InputError(said)
            note(f"trial {job.trial.number} failed: {problem}")
            self.study.fail(job.trial, problem)
        else:
            job.spent.setdefault("steps_before", result.seconds["steps_before"])
            for key in result.seconds.keys() - {"steps_before"}:
                job.spent[key] = job.spent.get(key, 0.0) + result.seconds[key]
            if job.stage < len(job.stops):
                self._stage_ended(worker, job)
            else:
                self._finished(worker, job, result)
        self.file.update(trials=self.study.records(), seconds=round(self.clock.used, 1))

    def _facts(self, job: TrialJob) -> dict[str, Any]:
        return self.recipes.facts(job.recipe, job.prepared)

    def _kept(self, job: TrialJob, result: TrialResult) -> str:
        """Keep a bug's traceback in the sweep's logs; return the problem in a sentence that says where."""
        path = self.study.root / "logs" / f"trial-{job.trial.number}.txt"
        atomic_files.write_text(path, result.traceback)
        return f"{result.problem} (its traceback is in {path})"

    def _stage_ended(self, worker: int, job: TrialJob) -> None:
        """Judge the answers at a stage's end; go on, or give the trial up."""
        at = RunDir(stage_answers(RunDir(job.root), job.stops[job.stage]).parent)
        value = self._value(at, job)[0]
        job.stage += 1
        if self.study.should_prune(job.trial, value, job.stage):
            note(f"trial {job.trial.number} is stopped after stage {job.stage} of {len(job.stops) + 1}: {value:.3f}")
            self.study.prune(job.trial, folder=str(job.root), seconds=job.spent, minutes=self.clock.used / 60,
                             so_far=value, **self._facts(job))  # fmt: skip
        else:
            self._begin(worker, job)

    def _finished(self, worker: int, job: TrialJob, result: TrialResult) -> None:
        folder = RunDir.at(job.root)
        inputs.check_trained(folder, job.prepared)
        value, scores = self._value(folder, job)
        manifest = folder.manifest()
        done = manifest["phases"]["generate"]
        trained = "trained_in" in manifest["phases"]["train"]
        work, before = cost_estimate.work(job.recipe, job.prepared, trained=trained), job.spent["steps_before"]
        took = {
            "steps": job.spent.get("steps", 0.0) + before, "answers": done["decoding_seconds"],
            "all": job.spent["all"] + before, "load": job.spent.get("load", 0.0),
        }  # fmt: skip
        self._seated.add(worker)
        if len(job.stops):
            self.study.should_prune(job.trial, value, job.stage + 1)  # so that Hyperband knows the last stage
        self.study.finish(
            job.trial, value, folder=str(job.root), training=job.training, scores=scores, priced=job.priced,
            seconds=job.spent, times=result.times, minutes=self.clock.used / 60, worker=worker,
            trained_in=str(job.trained) if job.trained else None,
            work=[work.tokens, work.prompts, work.max_new_tokens], took=took, **self._facts(job),
        )  # fmt: skip
        self._unreported.append(job)
        finished = sum(r["value"] is not None and not r.get("repeats") for r in self.study.records())
        more = ""
        if self.clock.allowed is not None and (each := cost_estimate.seconds(work, self._measured)):
            more = f"; {self._fitting(each)} more like it fit"
        note(
            f"trial {job.trial.number}: {value:.3f} in {job.spent['all'] / 60:.1f} min; {finished} done, "
            f"{self.clock.used / 60:.1f} min used{more}"
        )

    def _value(self, folder: RunDir, job: TrialJob) -> tuple[float, dict[str, float | None]]:
        """Judge a folder's answers and return their mean and each prompt's score, by the sweep's objective."""
        content = json.loads(folder.scores.read_text(encoding="utf-8")) if folder.scores.is_file() else None
        if content is None:
            group = judge_phase.groups(job.prepared.prompts)
            if folder.manifest_path.is_file():
                judge_phase.judge_phase(folder, job.recipe, job.prepared.prompts)
            else:
                judge_phase.judge_run(folder, job.recipe.judge, group, seed=job.recipe.seed)
            content = json.loads(folder.scores.read_text(encoding="utf-8"))
        measure = "score" if self.search.objective == "judge" else self.search.objective
        scores = {
            key: None if each["score"] is None else float(each[measure]) for key, each in content["prompts"].items()
        }
        there = [score for score in scores.values() if score is not None]
        if not there:
            raise InputError(f"{folder.scores}: the judge gave no score")
        return sum(there) / len(there), scores
