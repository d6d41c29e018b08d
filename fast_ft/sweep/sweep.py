"""A sweep: trials of one recipe within the hours, the best of them written out as a recipe, and a page about all.

Everything lies in the sweep's folder; the same command goes on with it. study.journal is the truth, the rest is made
from it: sweep.json, report.html, best.yaml. Each trial is an ordinary run folder under trials/. logs/ has what workers
wrote, and the traceback of each trial that a bug ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, gpu, untrusted_files
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.signals import interruptible
from fast_ft.data import dataset, exclude
from fast_ft.judge import statistics
from fast_ft.pipeline import judge_phase, phases
from fast_ft.recipe.loader import content_digest, resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run import lock
from fast_ft.run.folder import RunDir, differences, now
from fast_ft.sweep import cost_estimate, files, inputs, report, search_space, validation_set
from fast_ft.sweep.best import best_text, verdict
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.cost_estimate import Measured, Work
from fast_ft.sweep.driver import Driver
from fast_ft.sweep.job import TrialJob
from fast_ft.sweep.search_space import Point, Space
from fast_ft.sweep.study import Study
from fast_ft.sweep.trial_queue import TrialQueue
from fast_ft.sweep.trial_runner import TrialTask, is_trained
from fast_ft.sweep.workers import LocalWorkers, WorkerPool, visible_gpus

_END = 5.0  #: seconds kept for the page and for what is written at the end


class Sweep:
    """A sweep's folder and its parts. `run` does it, or goes on with it."""

    def __init__(self, recipe: Recipe, recipe_path: str | Path, *, hours: float | None, output: Path | None = None):
        if recipe.search is None:
            raise InputError(
                f"{recipe_path}: a sweep needs a search section, such as\n"
                "  search: {space: {lora.r: [8, 16], train.learning_rate: {low: 1e-4, high: 1e-3, log: true}}}"
            )
        self.recipe, self.search, self.name = recipe, recipe.search, Path(recipe_path).name
        if hours is None and self.search.trials is None and self.search.sampler != "grid":
            raise InputError("a sweep needs an end: give --hours, or search.trials in the recipe")
        if hours is not None and not hours > 0:
            raise InputError(f"--hours {hours:g}: give more than 0")
        if self.search.objective == "judge" and recipe.judge.kind == "none":
            raise InputError(
                "search.objective: the recipe names no judge (judge.kind: none). Name one, or compare answers with the "
                "validation rows' own: search.objective: rouge_l, chrf or exact_match"
            )
        self.space: Space = search_space.read(recipe)
        if self.search.sampler == "grid":
            self.space.check_grid()
        content = {**resolved(recipe), "search": recipe.search.model_dump(mode="json")}
        self.root = output or Path("runs") / f"sweep-{Path(recipe_path).stem}-{content_digest(content)[:8]}"
        self.content, self.hours = content, hours
        self._check_lease: Callable[[], object] = lambda: None
        self.validation_path = self.root / "validation.json"
        self.sweep_json, self.best_yaml = self.root / "sweep.json", self.root / "best.yaml"

    def run(self, *, workers: int | None = None, ray: str | None = None) -> Path:
        """Do the sweep and return its folder. BudgetMissed where the hours end before any trial does."""
        phases.check_model(self.recipe)
        if self.search.objective == "judge":
            judge_phase.check(self.recipe.judge.model_copy(update={"references": None}), [])
        with interruptible(), lock.hold(self.root) as held:
            self._check_lease = held.check
            untrusted_files.refuse_links(self.root)
            clock = Clock(self.root / "clock.json", None if self.hours is None else self.hours * 3600)
            self._begin()
            study = Study(self.root / "study.journal", self.search, self.space, self.recipe.seed, held.check)
            study.check()
            study.same_inputs(inputs.of_sweep(self.recipe, self.validation_path) | inputs.of_trial(self.recipe))
            crew = self._crew(workers, ray)
            try:
                driver = self._driver(study, crew, clock)
                driver.run()
                self._finish(driver, crew, clock)
            except KeyboardInterrupt:
                crew.interrupt()  # so that trials under way save their steps, as a run does
                raise
            finally:
                if not held.lost:
                    clock.tick(now=True)
                crew.close()
        return self.root

    def recipe_at(self, point: Point) -> Recipe:
        """Return a trial's complete recipe: the point's values, the validation set, and a folder of its own.

        The folder's name is a digest of the recipe that does not hang on where the sweep's folder lies.
        """
        recipe = search_space.at(self.recipe, point, self._fixed)
        tree = resolved(recipe)
        tree["data"]["test"] = tree["judge"]["references"] = self.validation_path.name
        return recipe.model_copy(update={"output_dir": str(self.root / "trials" / content_digest(tree)[:8])})

    def best_at(self, point: Point) -> Recipe:
        """Return the recipe to keep: the point's values, with the recipe's own test set and judge."""
        return search_space.at(self.recipe, point, {"data.exclude": self._fixed["data.exclude"]})

    def _begin(self) -> None:
        """Draw the validation set, or read the one that was drawn; write what this sweep is."""
        if self.sweep_json.is_file():
            there = files.read_sweep(self.sweep_json)
            differ = differences(there["recipe"], self.content, ignore=("output_dir",))
            if differ:
                raise InputError(f"{self.root}: holds a sweep of another recipe ({', '.join(differ)}). Choose --output")
            held_out = self.validation_path
            if not held_out.is_file() or atomic_files.sha256_file(held_out) != there["validation"]["file"]:
                raise InputError(f"{held_out}: changed since the sweep began. Put it back, or start anew")
        elif not self.validation_path.is_file():
            validation_set.write(self.validation_path, validation_set.draw(self.recipe))
        prompts, _ = dataset.load_prompts(str(self.validation_path))
        self._validation = sorted(exclude.digests_of(prompts))
        self._test = sorted(validation_set.test_digests(self.recipe))
        self._asked = len(dataset.load_prompts(self.recipe.data.test)[0]) if self.recipe.data.test else 0
        self._fixed: dict[str, Any] = {
            "data.test": str(self.validation_path),
            "data.exclude": sorted({*self.recipe.data.exclude, *self._validation}),
            "backup_dir": None,  # a trial's folder alone would be no backup of the sweep
            "judge.references": str(self.validation_path),
            "judge.base_prompts": 0,
        }
        if self.search.objective != "judge":
            self._fixed["judge.kind"] = "reference"
        if not self.sweep_json.is_file():
            self._write(
                recipe=self.content, recipe_file=self.name, started=now(), environment=gpu.describe(),
                validation={"file": atomic_files.sha256_file(self.validation_path), "prompts": self._validation,
                            "in_test": sorted({*self._validation} & {*self._test})},
                test={"prompts": self._test}, trials=[],
            )  # fmt: skip
            for text in self.space.notes:
                note(f"note: {text}")
            if self.recipe.backup_dir is not None:
                note("note: backup_dir is for single runs; to keep a sweep there, give that folder as --output")

    def _write(self, **values: Any) -> None:
        self._check_lease()
        there = json.loads(self.sweep_json.read_text(encoding="utf-8")) if self.sweep_json.is_file() else {}
        atomic_files.write_json(self.sweep_json, there | values)

    def _crew(self, workers: int | None, ray: str | None) -> WorkerPool:
        if ray is not None:
            from fast_ft.sweep.ray_workers import RayWorkers

            return RayWorkers(ray, workers)
        return LocalWorkers(workers or max(1, len(visible_gpus())), self.root / "logs")

    def _driver(self, study: Study, crew: WorkerPool, clock: Clock) -> Driver:
        queue = TrialQueue(self.recipe, self.space, study, recipe_at=self.recipe_at, training_of=inputs.training_digest)
        return Driver(
            self.name, queue, crew, clock, facts_of=self._facts, reserve=self._reserve,
            changed=lambda: self._write(trials=study.records(), seconds=round(clock.used, 1)),
        )  # fmt: skip

    def _facts(self, job: TrialJob) -> dict[str, Any]:
        changed = differences(
            resolved(self.recipe), resolved(job.recipe), ignore=("output_dir", *self._fixed, "judge.kind")
        )
        proof = validation_set.proof(job.prepared, self._validation, self._test)
        assert not proof["in_validation"], "data.exclude keeps the validation rows out of every selection"
        return {"proof": proof,
                "changed": {key: value for key, (_, value) in changed.items()}}  # fmt: skip

    def _reserve(self, measured: list[Measured]) -> float:
        """Return the seconds that the end needs: the best recipe's answers to the test prompts, and the page."""
        longest = max((m.work.max_new_tokens for m in measured), default=self.recipe.generate.max_new_tokens)
        return _END + 1.2 * (cost_estimate.seconds(Work(0, self._asked, longest), measured) or 0.0)

    def _finish(self, driver: Driver, crew: WorkerPool, clock: Clock) -> None:
        """Write best.yaml, its adapter and pred.json, and the page."""
        records = driver.study.records()
        finished = [r for r in records if r["value"] is not None and not r.get("repeats")]
        if not finished:
            raise BudgetMissed(f"the hours were over before a trial was done; more --hours go on in {self.root}")
        best = max(finished, key=lambda r: (r["value"], -r["number"]))
        own = next((r for r in finished if r["point"] == self.space.own), None)
        against = None
        if own is not None and own is not best:
            against = statistics.compare(best["scores"], own["scores"], self.recipe.seed, "the recipe as it stood")
        sentence = verdict(best, own, against, len(finished))
        recipe = self.best_at(best["point"])
        atomic_files.write_text(self.best_yaml, best_text(recipe, self.root, sentence))
        folder = self._best_run(recipe, best, crew)
        self._write(
            trials=records, seconds=round(clock.used, 1), hours=self.hours, ended=driver.supply.ended,
            best={"number": best["number"], "folder": best["folder"], "value": best["value"], "run": str(folder.root),
                  "against_recipe": against, "sentence": sentence},
            importances=driver.study.importances(),
        )  # fmt: skip
        report.write(self.root)
        note(driver.supply.ended + f"; {clock.used / 60:.1f} min used")
        note(sentence)
        if equal := best["proof"]["in_test"]:
            note(
                f"warning: {len(equal)} prompts that the best recipe trains on equal a test prompt. A sweep takes no "
                "row out because of the test set; best/manifest.json names these rows."
            )

    def _best_run(self, recipe: Recipe, best: dict[str, Any], crew: WorkerPool) -> RunDir:
        """Answer the test prompts with the best trial's adapter, in best/."""
        trained: Path | None = Path(best["folder"])
        if not is_trained(Path(best["folder"])):
            note(f"note: {best['folder']} holds no adapter any more: the best recipe is trained again")
            trained = None
        here = recipe.model_copy(update={"output_dir": str(self.root / "best"), "backup_dir": None})
        task = TrialTask(here, self.name, trained)
        there = self.root / "best" / "manifest.json"
        if there.is_file() and content_digest(RunDir.at(there.parent).manifest()["recipe"]) != content_digest(
            resolved(here)
        ):
            (self.root / "best").rename(
                self.root / f"best-until-{now().replace(':', '')}"
            )  # more hours found a better one
        crew.submit(crew.idle()[0], task)
        while not (found := crew.wait(1.0)):
            pass
        result = found[0][1]
        what = "the best recipe's answers came to nothing"
        if result is None:
            raise InputError(f"{what}: their worker was lost. The same command tries again")
        if result.traceback:
            raise RuntimeError(f"{what}: {result.problem}\n{result.traceback}")
        if result.problem:
            raise InputError(f"{what}: {result.problem}")
        folder = RunDir.at(self.root / "best")
        prompts = dataset.load_prompts(recipe.data.test)[0] if recipe.data.test else []
        if prompts and recipe.judge.kind != "none" and folder.done("judge") is None:
            phases.judge_phase(folder, recipe, prompts)
        phases.report_phase(folder)
        return folder
