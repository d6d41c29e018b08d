"""What the commands do that take a recipe, or nothing; cli/run_commands.py has those that take a finished run.

A new command is a function here, a line in COMMANDS, and its options in cli/parser.py. It takes the parsed options
(options.overrides: the words key=value) and returns the exit status. Modules are imported when their command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.common.errors import BudgetMissed, InputError, nearest

if TYPE_CHECKING:
    from fast_ft.data.prepare import SelectedData
    from fast_ft.recipe.schema import Recipe
    from fast_ft.sweep.workers import WorkerPool


def _recipe(options: argparse.Namespace) -> Recipe:
    from fast_ft.common.console import note
    from fast_ft.common.folders import expanded
    from fast_ft.recipe.lint import lint
    from fast_ft.recipe.loader import load_recipe

    if options.command != "sweep" and (words := [word for word in options.overrides if word.startswith("search")]):
        raise InputError(f"override {words[0]}: only `sweep` reads search, and this command is another: leave it out")
    options.recipe = str(expanded(options.recipe))  # recipes/NAME.yaml that came with the program is found anywhere
    recipe = load_recipe(options.recipe, options.overrides)
    for warning in lint(recipe)[1]:
        note(f"warning: {warning}")
    return recipe


def _run(options: argparse.Namespace, until: str = "pred") -> int:
    recipe = _recipe(options)
    from fast_ft.common.console import note
    from fast_ft.pipeline.run import run
    from fast_ft.run.folder import RunDir

    if until == "pred" and options.stop_after is not None:
        return _preview(options, recipe)
    missed: BudgetMissed | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the libraries' banners; stdout is for results
            folder = run(recipe, options.recipe, until=until, force_resume=options.force_resume)
    except BudgetMissed as error:
        if error.complete is None:
            raise
        folder, missed = RunDir.at(error.complete), error
    if until == "pred" and folder.scores.is_file():
        from fast_ft.cli.show_scores import print_scores

        print_scores(folder)
    note(f"done: {folder.root if until == 'pred' and folder.pred.is_file() else folder.adapter}")
    note(f"look at it: {folder.report} (it holds training rows: not to be shared)")
    if missed is not None:
        raise missed
    return 0


def _preview(options: argparse.Namespace, recipe: Recipe) -> int:
    from fast_ft.pipeline.preview import preview, print_preview

    with contextlib.redirect_stdout(sys.stderr):
        content = preview(recipe, options.recipe, options.stop_after)
    print_preview(content)
    return 0


def _train(options: argparse.Namespace) -> int:
    return _run(options, until="adapter")


def _quickstart(options: argparse.Namespace) -> int:
    options.recipe = "recipes/quickstart.yaml"
    return _run(options)


def _init(options: argparse.Namespace) -> int:
    from fast_ft.cli.new_recipe import write_recipe
    from fast_ft.common.console import note

    path = write_recipe(options.rows, options.output, model=options.model, test=options.test)
    note(f"written: {path}")
    print(f"python -m fast_ft data {shlex.quote(str(path))}")
    return 0


def _data(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    _one_view(options)
    from fast_ft.cli.row_tables import print_left_out, print_list, print_why
    from fast_ft.cli.tables import print_row, print_selection, selection_json
    from fast_ft.common.text_safety import harmless
    from fast_ft.data.prepare import select_data

    prepared = select_data(recipe)
    if options.json:
        print(harmless(json.dumps(selection_json(recipe, prepared), indent=2, ensure_ascii=False)))
        return 0
    if options.stand_in is not None:
        return _stand_in(recipe, prepared, options.stand_in, options.output)
    if options.why is not None:
        print_why(recipe, prepared, options.why)
        return 0
    if options.list:
        print_list(prepared)
        print_left_out(recipe, prepared)
        return 0
    if options.explore:
        return _explore(recipe, prepared, options.output)
    if options.row is None:
        print_selection(recipe, prepared, options.show)
        return 0
    ids = [example.id for example in prepared.examples]
    if options.row not in ids:
        raise InputError(f"--row {options.row!r}: not among the {len(ids)} selected rows{nearest(options.row, ids)}")
    print_row(prepared, options.row)
    return 0


def _one_view(options: argparse.Namespace) -> None:
    """Raise InputError where `data` is asked for two things at once, or given a file that it would not write."""
    words = ("json", "stand_in", "why", "list", "explore", "row", "show")  # --show 0 asks for nothing
    asked = [f"--{word.replace('_', '-')}" for word in words if getattr(options, word) not in (None, False, 0)]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)}: data shows one of them at a time. Leave out all but one.")
    if options.output is not None and asked not in (["--explore"], ["--stand-in"]):
        raise InputError("--output: it is the file of --explore or of --stand-in N: give one of them too")


def _stand_in(recipe: Recipe, prepared: SelectedData, count: int, output: str | None) -> int:
    from fast_ft.common.console import note
    from fast_ft.data import stand_in

    if output is None:
        raise InputError("--stand-in: it writes rows to a file: give --output FILE too")
    stand_in.write(Path(output), stand_in.draw(prepared, count, recipe.seed))
    note(
        f"{output} holds {count} training rows with their answers: keep it to yourself. Answer them: `generate RUN_DIR "
        f"data.test={output}`; score the answers: `judge RUN_DIR data.test={output} judge.references={output}`"
    )
    return 0


def _explore(recipe: Recipe, prepared: SelectedData, output: str | None) -> int:
    from fast_ft.common.atomic_files import write_text
    from fast_ft.common.console import note
    from fast_ft.common.outputs import check_output
    from fast_ft.report.explorer import answer, explore_page
    from fast_ft.report.html import is_page
    from fast_ft.report.server import serve

    if output is not None:
        check_output(output, is_page, "map.html")
    page = explore_page(recipe, prepared, live=output is None)
    if output is None:
        serve(page, answer(recipe, prepared))
    else:
        write_text(Path(output), page)
        note(f"{output} holds training rows: keep it to yourself")
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from fast_ft.cli.tables import print_plan
    from fast_ft.data.prepare import prepare
    from fast_ft.plan.planner import describe

    content = describe(recipe, prepare(recipe), options.gpu, options.num_processes)
    if options.json:
        print(json.dumps(content, indent=2))
    else:
        print_plan(content)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from fast_ft.common.console import note
    from fast_ft.sweep.sweep import Sweep

    output = Path(options.output) if options.output else None
    sweep = Sweep(recipe, options.recipe, hours=options.hours, output=output)
    if options.resume and not sweep.sweep_json.is_file():
        raise InputError(f"--resume: no sweep of this recipe was begun in {sweep.root}")
    with contextlib.redirect_stdout(sys.stderr):
        root = sweep.run(lambda logs: _workers(options, logs))
    note(f"done: {root / 'best.yaml'}, {root / 'best'}")
    note(f"look at it: {root / 'report.html'} (it holds predictions: not to be shared)")
    return 0


def _workers(options: argparse.Namespace, logs: Path) -> WorkerPool:
    """Return a sweep's workers: on a Ray cluster, or processes here, one for each GPU unless --workers says more."""
    from fast_ft.common.gpu import visible_gpus
    from fast_ft.sweep.trial_runner import TrialRunner

    if options.ray is not None:
        from fast_ft.sweep.ray_workers import RayWorkers

        return RayWorkers(options.ray, options.workers, TrialRunner)
    from fast_ft.sweep.workers import LocalWorkers

    return LocalWorkers(options.workers or max(1, len(visible_gpus())), logs, TrialRunner)


def _doctor(options: argparse.Namespace) -> int:
    from fast_ft.doctor import doctor, findings

    found = doctor.examine()
    if options.json:
        print(json.dumps(findings.as_json(found), indent=2))
    else:
        findings.print_findings(found)
    return 0 if findings.works(found) else 3


def _schema(options: argparse.Namespace) -> int:
    from fast_ft.recipe.loader import json_schema
    from fast_ft.recipe.reference import reference_page

    print(reference_page() if options.markdown else json.dumps(json_schema(), indent=2))
    return 0


#: Those that load a model, and torch for it.
LOADING = frozenset({"run", "quickstart", "train", "generate", "chat", "export", "reproduce", "sweep"})
#: Those that go on, when they are started again, from what they had done when they were stopped.
GOES_ON = frozenset({"run", "quickstart", "train", "generate", "judge", "sweep", "reproduce"})
#: Those that several processes can do together (common/process_group.py).
TOGETHER = ("run", "train")

COMMANDS = {
    "run": _run,
    "train": _train,
    "quickstart": _quickstart,
    "init": _init,
    "data": _data,
    "plan": _plan,
    "sweep": _sweep,
    "doctor": _doctor,
    "schema": _schema,
}
