"""The one Optuna study of a sweep: asked and told by the driver alone, kept in a journal file that outlives kills.

All that is known of a trial stands in the journal, as its `facts`; sweep.json and the page are made from it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fast_ft.errors import InputError
from fast_ft.recipe import Search
from fast_ft.sweep import space as spaces
from fast_ft.sweep.space import Point, Space

FACTS = "facts"


class Study:
    """Optuna's study over a Space. Values are maximised."""

    def __init__(self, path: Path, search: Search, space: Space, seed: int) -> None:
        optuna = _optuna()
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        self._space = space
        self._distributions = {axis.key: axis.distribution() for axis in space.axes}
        self._study = optuna.create_study(
            storage=storage, study_name="sweep", direction="maximize", load_if_exists=True, pruner=spaces.pruner(search)
        )
        # another start draws other numbers than those drawn already
        self._study.sampler = spaces.sampler(search, seed + len(self._study.get_trials(deepcopy=False)))
        self._states = optuna.trial.TrialState

    def ask(self, point: Point | None = None) -> Any:
        """Return a new trial: at `point`, or where the sampler wants one."""
        if point is not None:
            self._study.enqueue_trial(point)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the recipe's own number may lie outside of its range
            return self._study.ask(self._distributions)

    def finish(self, trial: Any, value: float, **facts: Any) -> None:
        """Keep a finished trial's value and facts."""
        self._tell(trial, facts | {"state": "finished"}, value)

    def prune(self, trial: Any, **facts: Any) -> None:
        """Keep a trial that was stopped at a stage's end; its last reported value is kept too."""
        self._tell(trial, facts | {"state": "stopped early"}, state=self._states.PRUNED)

    def fail(self, trial: Any, reason: str, **facts: Any) -> None:
        """Keep a trial without a value, and why it has none; the sampler does not learn from it."""
        self._tell(trial, {"state": "no result", "reason": reason} | facts, state=self._states.FAIL)

    def note(self, trial: Any, **facts: Any) -> None:
        """Add to what is known of a trial."""
        trial.set_user_attr(FACTS, trial.user_attrs.get(FACTS, {}) | facts)

    def hopeless(self, trial: Any, value: float, stage: int) -> bool:
        """Report a trial's value at the end of stage 1, 2, ...; return whether the pruner gives it up."""
        trial.report(value, stage)
        return trial.should_prune()

    def interrupted(self) -> list[Point]:
        """Close the trials that were in flight when an earlier command ended, and return their points, oldest first."""
        running = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        for trial in running:
            self._study.tell(trial.number, state=self._states.FAIL)
        return [dict(trial.params) for trial in running if trial.params]

    def records(self) -> list[dict[str, Any]]:
        """Return {number, point, value, stages, state, ...} of all trials that are done with, oldest first."""
        return [
            {
                "number": trial.number,
                "point": dict(trial.params),
                "value": trial.value if trial.state == self._states.COMPLETE else None,
                "stages": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                **trial.user_attrs.get(FACTS, {}),
            }
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished() and "state" in trial.user_attrs.get(FACTS, {})
        ]

    def importances(self) -> dict[str, float] | None:
        """Return each axis's share of importance (PED-ANOVA, arXiv 2304.10255), or None below 4 finished trials."""
        import optuna

        finished = self._study.get_trials(deepcopy=False, states=(self._states.COMPLETE,))
        if len(finished) < 4 or len({trial.value for trial in finished}) < 2:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
            try:
                return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))
            except (ValueError, RuntimeError):  # an axis with one value among them
                return None

    def _tell(self, trial: Any, facts: dict[str, Any], value: float | None = None, state: Any = None) -> None:
        self.note(trial, **facts)
        self._study.tell(trial, value, state=state)


def _mend(path: Path) -> None:
    """Cut off a last line that a kill left half: Optuna would append to it, and then read neither. Drop a dead's lock.

    The driver holds the sweep's folder, so nobody else is writing.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise InputError(f"a sweep needs Optuna ({error}): pip install -r requirements-sweep.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
