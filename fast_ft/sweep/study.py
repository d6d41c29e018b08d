"""The one Optuna study of a sweep: the driver alone asks and tells it, and a journal file keeps it through kills.

All that is known of a trial stands in the journal, as its `facts`; sweep.json and the page are made from it. The
digests of what trials read stand there too, as the study's `inputs`. A trial's folder is kept by its name, since a
sweep's folder may move.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.errors import InputError
from fast_ft.recipe.schema import Search
from fast_ft.sweep import files, journal
from fast_ft.sweep.search_space import Point, SearchSpace

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

FACTS, INPUTS = "facts", "inputs"  #: keys in the journal: of a trial, of the study


class Study:
    """Optuna's study over a SearchSpace. Values are maximised. `before_write` may refuse each write to the journal."""

    def __init__(
        self,
        path: Path,
        search: Search,
        space: SearchSpace,
        seed: int,
        before_write: Callable[[], object] = lambda: None,
    ) -> None:
        optuna = _optuna()
        self._path, self.root = path, path.parent  #: root: the sweep's folder
        self.root.mkdir(parents=True, exist_ok=True)
        journal.mend(path)
        self._states = optuna.trial.TrialState
        self._distributions = {axis.key: axis.distribution() for axis in space.axes}
        lock: Any = journal.LeaseLock(before_write)
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
        begun = path.stat().st_size > 0
        named: dict[str, Any] = {"study_name": "sweep", "pruner": _pruner(search)}
        with journal.read_by_optuna(path):
            storage = optuna.storages.JournalStorage(backend)
            if begun:
                self._study = optuna.load_study(storage=storage, **named)
            else:
                self._study = optuna.create_study(storage=storage, direction="maximize", **named)
            trials, _ = self._study.get_trials(deepcopy=False), self.records()
        # Another start of the command has to draw other numbers than those drawn already.
        self._study.sampler = _sampler(search, seed + len(trials))

    def check(self) -> None:
        """Raise InputError where the journal is not that of a sweep of this space."""
        if [direction.name for direction in self._study.directions] != ["MAXIMIZE"]:
            raise InputError(f"{self._path}: holds no study that maximises one value. {journal.REMEDY}")
        for record in self.records():
            files.check_record(record, self._path, journal.REMEDY)
        files.check_inputs(self._study.user_attrs.get(INPUTS, {}), self._path, journal.REMEDY)
        self._check_space()

    def _check_space(self) -> None:
        """Raise InputError where earlier trials were drawn from other values: Optuna mixes no two lists of values."""
        from optuna.distributions import check_distribution_compatibility

        for trial in self._study.get_trials(deepcopy=False):
            for key, drawn_from in trial.distributions.items():
                try:
                    check_distribution_compatibility(drawn_from, self._distributions[key])
                    self._distributions[key].to_internal_repr(trial.params[key])
                except (KeyError, ValueError):
                    raise InputError(
                        f"search.space.{key}: trial {trial.number} in {self._path} was drawn from other values than "
                        "the recipe has now. Put those back, or begin a new sweep with --output."
                    ) from None

    def same_inputs(self, found: Mapping[str, str]) -> None:
        """Keep the digests of what a trial reads, which all trials have to share.

        found: {what it is, in words: digest of its content}. Raises InputError that names what has changed.
        """
        known = self._study.user_attrs.get(INPUTS, {})
        if changed := [name for name, digest in found.items() if known.get(name, digest) != digest]:
            raise InputError(
                f"{self.root}: changed since this sweep began: {', '.join(changed)}. Trials are compared with one "
                "another, so all of them read the same. Put back what was there, or begin a new sweep with --output."
            )
        if new := {name: digest for name, digest in found.items() if name not in known}:
            self._study.set_user_attr(INPUTS, known | new)

    def ask(self, point: Point | None = None) -> Trial:
        """Return a new trial: at `point`, or at one that the sampler chooses."""
        if point is not None:
            self._study.enqueue_trial(point)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the recipe's own number may lie outside of its range
            return self._study.ask(self._distributions)

    def finish(self, trial: Trial, value: float, **facts: Any) -> None:
        """Keep a finished trial's value and facts."""
        self._tell(trial, facts | {"state": "finished"}, value)

    def prune(self, trial: Trial, **facts: Any) -> None:
        """Keep a trial that was stopped at the end of a stage, with its last reported value."""
        self._tell(trial, facts | {"state": "stopped early"}, state=self._states.PRUNED)

    def fail(self, trial: Trial, reason: str, **facts: Any) -> None:
        """Keep a trial without a value, and why it has none; the sampler does not learn from it."""
        self._tell(trial, {"state": "no result", "reason": reason} | facts, state=self._states.FAIL)

    def note(self, trial: Trial, **facts: Any) -> None:
        """Add to what is known of a trial."""
        trial.set_user_attr(FACTS, trial.user_attrs.get(FACTS, {}) | facts)

    def should_prune(self, trial: Trial, value: float, stage: int) -> bool:
        """Report a trial's value at the end of stage 1, 2, ... and return whether the pruner gives the trial up."""
        trial.report(value, stage)
        return trial.should_prune()

    def interrupted(self) -> list[Point]:
        """Close the trials that were in flight when an earlier command ended, and return their points, oldest first."""
        while self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
            with journal.read_by_optuna(self._path):
                self.ask()  # a kill came before Optuna gave it out; it would take the place of the next point
        running = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        for trial in running:
            self._study.tell(trial.number, state=self._states.FAIL)
        return [dict(trial.params) for trial in running if trial.params.keys() == self._distributions.keys()]

    def records(self) -> list[dict[str, Any]]:
        """Return {number, point, value, stages, state, ...} of all trials that have ended, oldest first."""
        return [
            {
                "number": trial.number,
                "point": dict(trial.params),
                "value": trial.value if trial.state == self._states.COMPLETE else None,
                "stages": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                **self._placed(trial.user_attrs.get(FACTS, {})),
            }
            for trial in self._study.get_trials(deepcopy=False)
            if self._is_told(trial)
        ]

    def _is_told(self, trial: FrozenTrial) -> bool:
        """Return whether a trial has ended as its facts say: a kill may come between the facts and Optuna's state."""
        ends = {"finished": self._states.COMPLETE, "stopped early": self._states.PRUNED}
        state = trial.user_attrs.get(FACTS, {}).get("state")
        return state is not None and trial.state == ends.get(state, self._states.FAIL)

    def _placed(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return a trial's facts with its folders below the sweep's own folder, wherever that was at the time."""
        kept = {key: Path(facts[key]) for key in ("folder", "trained_in") if isinstance(facts.get(key), str)}
        within = {key: path for key, path in kept.items() if path.parent.name == "trials"}
        return facts | {key: str(self.root / "trials" / path.name) for key, path in within.items()}

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

    def _tell(self, trial: Trial, facts: dict[str, Any], value: float | None = None, state: Any = None) -> None:
        self.note(trial, **facts)
        self._study.tell(trial, value, state=state)


def _sampler(search: Search, seed: int) -> BaseSampler:
    """Return Optuna's sampler. SearchSpace.grid lists grid points: Optuna's own sampler repeats some in parallel."""
    import optuna

    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: Search) -> BasePruner:
    """Return Optuna's pruner; its steps are stages, counted from 1."""
    import optuna

    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.NopPruner()


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise InputError(f"a sweep needs Optuna ({error}): pip install -r requirements-sweep.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
