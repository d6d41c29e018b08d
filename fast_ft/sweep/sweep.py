"""A sweep: trials of one recipe within the hours, the best of them written out as a recipe, and a page about all.

Everything lies in the sweep's folder; the same command goes on with it. study.journal is the truth, the rest is made
from it: sweep.json, report.html, best.yaml. Each trial is an ordinary run folder under trials/. logs/ has what workers
wrote, and the traceback of each trial that a bug ended.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, untrusted_files
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError
from fast_ft.common.signals import interruptible
from fast_ft.common.wording import counted
from fast_ft.data import contamination, dataset, stand_in
from fast_ft.judge import statistics
from fast_ft.models.loaders import choose
from fast_ft.pipeline import course_references, judge_phase, set_up
from fast_ft.recipe.loader import content_digest, resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.report import write
from fast_ft.run import lock, provenance
from fast_ft.run.folder import RunDir, differences, now
from fast_ft.sweep import files, inputs, report, search_space, validation_set
from fast_ft.sweep.best import best_text, verdict
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.driver import Driver
from fast_ft.sweep.files import SweepFile
from fast_ft.sweep.search_space import SearchSpace
from fast_ft.sweep.study import Study
from fast_ft.sweep.trial_folder import is_trained
from fast_ft.sweep.trial_queue import TrialQueue
from fast_ft.sweep.trial_recipes import TrialRecipes
from fast_ft.sweep.trial_task import TrialTask
from fast_ft.sweep.workers import WorkerPool


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
        self.space: SearchSpace = search_space.read(recipe)
        if self.search.sampler == "grid":
            self.space.check_grid()
        content = {**resolved(recipe), "search": recipe.search.model_dump(mode="json")}
        self.root = output or Path("runs") / f"sweep-{Path(recipe_path).stem}-{content_digest(content)[:8]}"
        self.content, self.hours = content, hours
        self.sweep_json, self.best_yaml = self.root / "sweep.json", self.root / "best.yaml"

    def run(self, make_workers: Callable[[Path], WorkerPool]) -> Path:
        """Do the sweep and return its folder. Raises BudgetMissed where the hours end before any trial does.

        make_workers: returns the workers, given the folder for what they write on stdout and stderr.
        """
        choose.refuse_absent(self.recipe.model.backend)
        set_up.check_model(self.recipe)
        if self.search.objective == "judge":
            judge_phase.check(self.recipe.judge.model_copy(update={"references": None}), [])
        if self.recipe.data.test is not None:  # the best recipe's answers are judged at the end
            course_references.check(self.recipe, dataset.load_prompts(self.recipe.data.test)[0])
        with interruptible(), lock.hold(self.root) as held:
            untrusted_files.refuse_links(self.root)
            clock = Clock(self.root / "clock.json", None if self.hours is None else self.hours * 3600)
            file = SweepFile(self.sweep_json, held.check)
            recipes = self.begin(file)
            study = Study(self.root / "study.journal", self.search, self.space, self.recipe.seed, held.check)
            study.check()
            study.same_inputs(inputs.of_sweep(self.recipe, recipes.validation_file) | inputs.of_trial(self.recipe))
            workers = make_workers(self.root / "logs")
            try:
                driver = Driver(recipes, TrialQueue(recipes, self.space, study), workers, clock, file)
                driver.run()
                self._finish(driver)
            except KeyboardInterrupt:
                workers.interrupt()  # so that trials under way save their steps, as a run does
                raise
            finally:
                if not held.lost:
                    clock.tick(now=True)
                workers.close()
        return self.root

    def begin(self, file: SweepFile | None = None) -> TrialRecipes:
        """Draw the validation set, or read the one that was drawn; write what this sweep is into its sweep.json."""
        file = file or SweepFile(self.sweep_json)
        validation_file = self.root / "validation.json"
        if self.sweep_json.is_file():
            there = files.read_sweep(self.sweep_json)
            differ = differences(there["recipe"], self.content, ignore=("run_name", "output_dir"))
            if differ:
                raise InputError(f"{self.root}: holds a sweep of another recipe ({', '.join(differ)}). Choose --output")
            was = there["validation"]["file"]
            if not validation_file.is_file() or atomic_files.sha256_file(validation_file) != was:
                raise InputError(
                    f"{validation_file}: changed since the sweep began. Put it back, or choose another --output"
                )
        elif not validation_file.is_file():
            stand_in.write(validation_file, validation_set.draw(self.recipe))
        validation = sorted(contamination.digests_of(dataset.load_prompts(str(validation_file))[0]))
        test = sorted(validation_set.test_digests(self.recipe))
        asked = (
            len(dataset.load_prompts(self.recipe.data.test, self.recipe.data.columns)[0])
            if self.recipe.data.test
            else 0
        )
        if not self.sweep_json.is_file():
            file.update(
                recipe=self.content, recipe_file=self.name, started=now(), environment=provenance.describe(),
                validation={"file": atomic_files.sha256_file(validation_file), "prompts": validation,
                            "in_test": sorted({*validation} & {*test})},
                test={"prompts": test}, trials=[],
            )  # fmt: skip
            for text in self.space.notes:
                note(f"note: {text}")
            if self.recipe.backup_dir is not None:
                note("note: backup_dir is for single runs; to keep a sweep there, give that folder as --output")
        return TrialRecipes(self.recipe, self.name, self.root, tuple(validation), tuple(test), asked)

    def _finish(self, driver: Driver) -> None:
        """Write best.yaml, its adapter and pred.json, and the page."""
        records = driver.study.records()
        finished = [r for r in records if r["value"] is not None and not r.get("repeats")]
        if not finished:
            raise BudgetMissed(f"the hours were over before a trial was done; more --hours go on in {self.root}")
        best = max(finished, key=lambda r: (r["value"], -r["number"]))
        own = next((r for r in finished if r["point"] == self.space.own), None)
        against = None
        if own is not None and own is not best:
            against = statistics.compare(best["scores"], own["scores"], self.recipe.seed, "the recipe itself")
        sentence = verdict(best, own, against, len(finished))
        recipe = driver.recipes.best_at(best["point"])
        atomic_files.write_text(self.best_yaml, best_text(recipe, self.root, sentence))
        folder = self._best_run(recipe, best, driver.workers)
        driver.file.update(
            trials=records, seconds=round(driver.clock.used, 1), hours=self.hours, ended=driver.queue.ended,
            best={"number": best["number"], "folder": best["folder"], "value": best["value"], "run": str(folder.root),
                  "against_recipe": against, "sentence": sentence},
            own=self._own_number(records), importances=driver.study.importances(),
        )  # fmt: skip
        report.write(self.root)
        note(driver.queue.ended + f"; {driver.clock.used / 60:.1f} min used")
        note(sentence)
        if equal := best["proof"]["in_test"]:
            note(
                f"warning: the best recipe trains on {counted(len(equal), 'prompt')} of the test set. A sweep takes no "
                "row out because of the test set; best/manifest.json names these rows."
            )

    def _own_number(self, records: list[dict[str, Any]]) -> int | None:
        """Return the number of the trial that is the recipe itself: not 0 where a stop came before its first end."""
        there = [r for r in records if r["point"] == self.space.own and not r.get("repeats")]
        return max(there, key=lambda r: r["value"] is not None)["number"] if there else None

    def _best_run(self, recipe: Recipe, best: dict[str, Any], workers: WorkerPool) -> RunDir:
        """Answer the test prompts with the best trial's adapter, in best/."""
        trained: Path | None = Path(best["folder"])
        if not is_trained(Path(best["folder"])):
            note(f"note: {best['folder']} holds no adapter any more: the best recipe is trained again")
            trained = None
        here = recipe.model_copy(update={"output_dir": str(self.root / "best"), "backup_dir": None})
        task = TrialTask(here, self.name, trained)
        there = self.root / "best"
        if (there / "manifest.json").is_file():
            former = content_digest(RunDir.at(there).manifest()["recipe"])
            if former != content_digest(resolved(here)):  # more hours found a better one
                there.rename(self.root / f"best-until-{now().replace(':', '')}")
        workers.submit(workers.idle()[0], task)
        while not (found := workers.wait(1.0)):
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
        prompts = dataset.load_prompts(recipe.data.test, recipe.data.columns)[0] if recipe.data.test else []
        if prompts and recipe.judge.kind != "none" and folder.done("judge") is None:
            judge_phase.judge_phase(folder, recipe, prompts)
        write.try_report(folder)
        return folder
