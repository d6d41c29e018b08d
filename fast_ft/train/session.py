"""Training: each stage is one SFTTrainer over the same model, with our own order of rows and our own step.

The trainer sees an effective batch as one batch. Our `training_step` cuts it into micro-batches of similar length
and divides each one's summed loss by the response tokens of the whole effective batch, so that the cut changes memory
and speed but not the gradient. Each step seeds torch from (recipe seed, stage, step): a resumed run draws the same
dropout and the same noise as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common import process_group, signals
from fast_ft.common.console import note
from fast_ft.common.minutes import TrainPace, longer
from fast_ft.data.batches import StageJob, StageResult
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.plans import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train import replicas, state
from fast_ft.train.divergence import Setbacks
from fast_ft.train.forward_backward import Passes
from fast_ft.train.optimizer import Flat, make_optimizer

Log = Callable[[dict[str, Any]], None]

_ONE_REQUEST = 3.0  #: seconds: a terminal's Ctrl-C comes from the terminal, and once more from the launcher


class Course:
    """Training over several stages: the optimizer, the schedule and the loss scale that go from one to the next.

    `jobs` are all stages, since one schedule spans them; `on_checkpoint` is called at stage ends and every
    `section.save_steps` steps; `log` gets one flat dict a step.

    Where several processes train (`ranks`), each has a course over the same jobs and takes its share of every batch.
    Gradients are added up before they are used, so weights stay equal; what hangs on one process's clock, memory or
    signals is agreed on.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        jobs: Sequence[StageJob],
        section: schema.Train,
        carry: schema.Carry,
        *,
        seed: int,
        pad_id: int,
        plan: TrainPlan,
        log: Log,
        work_folder: Path,
        ranks: process_group.Ranks = process_group.ALONE,
    ) -> None:
        self.loaded, self.jobs, self.section, self.carry = loaded, jobs, section, carry
        self.seed, self.pad_id, self.log, self.work_folder = seed, pad_id, log, work_folder
        self.plan, self.ranks = plan, ranks
        self.progress = state.Progress()
        self.flat = Flat(loaded.model)
        self.passes = Passes(
            loaded,
            self.flat,
            noise_alpha=section.neftune_noise_alpha,
            capture=plan.capture,
            recompute_layers=plan.recompute_layers,
            places=max(len(batch) for job in jobs for batch in job.batches),
            longest=max(len(row.input_ids) for job in jobs for row in job.rows),
            pad_id=pad_id,
        )
        self.optimizer = make_optimizer(self.flat, section)
        self.on_checkpoint: Callable[[Course], None] | None = None
        self.on_settled: Callable[[TrainPlan], None] | None = None  #: is told when memory made the plan smaller
        self.out_of_memory = 0  #: times that it was
        self.rehearsed = False  #: fit.rehearse has run
        self.interrupted = False
        self.pace: TrainPace | None = None  #: of budget.train_minutes
        self.notes: list[str] = []  #: what the manifest has to know
        self.setbacks = Setbacks(section.max_bad_steps)
        self._told = False  # that the budget will not do
        self.asked = 0.0  #: when this process was asked to stop
        self.time_is_up = False  #: by the budget, as agreed
        self.stop_after: int | None = None  #: steps over all stages; the schedule stays that of the whole course

    @property
    def finished(self) -> bool:
        return self.progress.stage >= len(self.jobs)

    @property
    def left(self) -> int | None:
        """How many steps may still be taken before `stop_after`; None: all."""
        return None if self.stop_after is None else max(0, self.stop_after - self.progress.global_step)

    @property
    def total(self) -> int:
        """All stages' steps."""
        return sum(len(job.batches) for job in self.jobs)

    @property
    def out_of_time(self) -> bool:
        """Whether budget.train_minutes ended the training before its last step."""
        return self.time_is_up and not self.finished and self.progress.global_step > 0

    def free(self) -> None:
        """Give back the model and all that was made over it. What is known of the steps stays."""
        del self.passes, self.optimizer, self.flat
        self.on_checkpoint = None
        self.setbacks.forget()
        self.loaded.free()

    def resume(self, folder: Path) -> None:
        """Go on from a saved state, in place of from the beginning.

        A learning rate that goes down early, since a budget ran out, does so no more where `pace` allows more minutes.
        """
        self.progress = state.read_progress(folder)
        if longer(self.pace.minutes if self.pace is not None else None, self.progress.minutes):
            self.progress.anneal_from, self.progress.stop_at = 0, None
        state.load(folder, self.loaded.model, self.optimizer)
        self._place()
        if self.finished:
            return
        if self.progress.step >= len(self.jobs[self.progress.stage].batches):
            self._next_stage()

    def _place(self) -> None:
        """Find the place by the steps done, where stages are not those of the checkpoint: a forced resume's."""
        at = self.progress
        lengths = [len(job.batches) for job in self.jobs]
        if at.stage < len(lengths) and sum(lengths[: at.stage]) + at.step == at.global_step <= sum(lengths):
            return
        at.stage, at.step = 0, at.global_step
        while at.stage < len(lengths) and at.step >= lengths[at.stage]:
            at.step -= lengths[at.stage]
            at.stage += 1

    def run(self) -> list[StageResult]:
        """Train what is left, and return the stages that were trained, at least in part."""
        results = []
        replicas.start(self)
        self.setbacks.begin(self)
        try:
            with signals.calling(self._stop):
                while self._goes_on():
                    job = self.jobs[self.progress.stage]
                    results.append(self._run_stage(job))
                    if self.setbacks.diverged and not self.interrupted:
                        self.setbacks.go_back(self)
                        if self.setbacks.gave_up:
                            break
                    elif self.progress.step == len(job.batches):  # else it was stopped; the checkpoint is saved
                        self._next_stage()
        finally:
            self.passes.close()
        return results

    def _goes_on(self) -> bool:
        replicas.agree(self)
        if self.interrupted:
            raise KeyboardInterrupt
        return not self.finished and self.left != 0 and not self.out_of_time

    def stepped(self, entry: dict[str, Any]) -> bool:
        """Take note of a finished step; tell whether training stops here, whatever the reason."""
        self.setbacks.stepped(entry, last=self.progress.global_step == self.total)
        if self.pace is not None:
            self._keep_pace(self.pace)
        replicas.agree(self)
        return self.interrupted or self.setbacks.diverged or self.out_of_time

    def _keep_pace(self, pace: TrainPace) -> None:
        at = self.progress
        pace.step(at.global_step)
        at.seconds, at.minutes = pace.elapsed(), pace.minutes
        if not self._told and (said := pace.forecast(at.global_step)):
            self._told = True
            self.notes.append(said)
            note(f"warning: {said}")
        if at.stop_at is None and (over := pace.anneal(at.global_step)) is not None:
            at.anneal_from, at.stop_at = at.global_step, at.global_step + over
            note(f"time is running out: the learning rate goes down over the {over} steps that still fit")

    @property
    def turns(self) -> bool:
        """Whether the learning rate begins to go down after this step, since a budget is running out."""
        return self.progress.stop_at is not None and self.progress.anneal_from == self.progress.global_step

    def rate_scale(self, index: int) -> float:
        """Return the factor on the schedule's learning rate for step `index`, counted from 0 over all stages."""
        at = self.progress
        if at.stop_at is None or at.stop_at == at.anneal_from:
            return at.rate_factor
        steps = at.stop_at - at.anneal_from
        return at.rate_factor * max(0, steps - (index - at.anneal_from)) / steps

    def _stop(self) -> None:
        """End the run after the step in hand, its state saved; asked a second time, at once."""
        now = time.monotonic()
        if self.asked and (self.ranks.size == 1 or now - self.asked > _ONE_REQUEST):
            raise KeyboardInterrupt
        self.asked = self.asked or now
        note("stopping after this step; its state is saved. Once more stops at once.")

    def checkpoint(self) -> None:
        """Save the state, unless the weights are known to be bad: the last step's loss was no number."""
        if self.on_checkpoint is not None and not self.setbacks.broken:
            self.on_checkpoint(self)

    def _next_stage(self) -> None:
        self.progress.stage, self.progress.step = self.progress.stage + 1, 0
        if not self.carry.optimizer and self.progress.stage < len(self.jobs):
            self.optimizer = make_optimizer(self.flat, self.section)
            self.progress.scaler = None

    def _run_stage(self, job: StageJob) -> StageResult:
        import torch

        from fast_ft.train.sft_trainer import make_trainer

        trainer = make_trainer(self, job)
        on_gpu = self.loaded.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        lost: process_group.Lost | None = None
        try:
            trainer.train()
        except process_group.Lost as error:  # the weights are those after the last step
            lost = error
        seconds = time.monotonic() - started
        scaler, seen = trainer.accelerator.scaler, trainer.seen
        self.progress.scaler = scaler.state_dict() if scaler is not None else None
        if lost is None:
            replicas.check(self)
        if not self.setbacks.diverged and seen:
            self.checkpoint()
        if lost is not None:
            note(f"warning: {lost}: training stops after step {self.progress.global_step}, its state saved")
            raise lost
        return StageResult(
            name=job.name,
            steps=len(seen),
            skipped_steps=sum(each["skipped"] for each in seen),
            tokens=sum(each["tokens"] for each in seen),
            supervised_tokens=sum(each["supervised_tokens"] for each in seen),
            first_loss=seen[0]["loss"],
            last_loss=seen[-1]["loss"],
            seconds=seconds,
            peak_gib=torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        )
