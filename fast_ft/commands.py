"""What each command does. Modules are imported when their command runs, so `--help` answers at once.

A new command is a function here, a line in COMMANDS, and its options in __main__.build_parser. It takes the parsed
options (options.overrides: the words key=value) and returns the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.errors import BudgetMissed, InputError, nearest

if TYPE_CHECKING:
    from fast_ft.prepare import Prepared
    from fast_ft.recipe import Recipe


def _recipe(options: argparse.Namespace) -> Recipe:
    from fast_ft.lint import lint
    from fast_ft.load import load_recipe
    from fast_ft.progress import note

    recipe = load_recipe(options.recipe, options.overrides)
    for warning in lint(recipe)[1]:
        note(f"warning: {warning}")
    return recipe


def _run(options: argparse.Namespace, until: str = "pred") -> int:
    recipe = _recipe(options)
    from fast_ft.pipeline import run
    from fast_ft.progress import note
    from fast_ft.rundir import RunDir

    if until == "pred" and options.stop_after is not None:
        return _taste(options, recipe)
    missed: BudgetMissed | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the libraries' banners; stdout is for results
            folder = run(recipe, options.recipe, until=until, force_resume=options.force_resume)
    except BudgetMissed as error:
        if error.complete is None:
            raise
        folder, missed = RunDir.at(error.complete), error
    if until == "pred" and folder.scores.is_file():
        from fast_ft.show_scores import print_scores

        print_scores(folder)
    note(f"done: {folder.root if until == 'pred' else folder.adapter}")
    note(f"look at it: {folder.report} (it holds training rows: not to be shared)")
    if missed is not None:
        raise missed
    return 0


def _taste(options: argparse.Namespace, recipe: Recipe) -> int:
    from fast_ft.taste import print_taste, taste

    with contextlib.redirect_stdout(sys.stderr):
        content = taste(recipe, options.recipe, options.stop_after)
    print_taste(content)
    return 0


def _train(options: argparse.Namespace) -> int:
    return _run(options, until="adapter")


def _data(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from fast_ft.prepare import prepare
    from fast_ft.show import print_row, print_selection, selection_json
    from fast_ft.terminal import harmless

    prepared = prepare(recipe, tokens=False)
    if options.json:
        print(harmless(json.dumps(selection_json(prepared), indent=2, ensure_ascii=False)))
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


def _explore(recipe: Recipe, prepared: Prepared, output: str | None) -> int:
    from fast_ft.progress import note
    from fast_ft.report.serve import serve
    from fast_ft.report.write import explore_page

    page = explore_page(recipe, prepared)
    if output is None:
        serve(page)
    else:
        from fast_ft.atomic import write_text

        write_text(Path(output), page)
        note(f"{output} holds training rows: keep it to yourself")
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from fast_ft.planning import describe
    from fast_ft.prepare import prepare
    from fast_ft.show import print_plan

    if options.num_processes < 1:
        raise InputError(f"--num-processes {options.num_processes}: give at least 1")
    content = describe(recipe, prepare(recipe), options.gpu, options.num_processes)
    if options.json:
        print(json.dumps(content, indent=2))
    else:
        print_plan(content)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fast_ft.again import generate_again
    from fast_ft.progress import note

    if options.grid:
        from fast_ft.grid import grid

        with contextlib.redirect_stdout(sys.stderr):
            points = grid(options.run, options.overrides)
        for point in points:
            print(f"{point['file']}  ended at EOS {point['ended_at_eos']:.0%}  mean {point['mean_tokens']:g} tokens")
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        pred = generate_again(options.run, options.overrides)
    note(f"done: {pred}")
    return 0


def _chat(options: argparse.Namespace) -> int:
    from fast_ft.chat import chat

    chat(options.run, options.overrides)
    return 0


def _judge(options: argparse.Namespace) -> int:
    from fast_ft.again import judge_again
    from fast_ft.show_scores import print_scores

    folder = judge_again(
        options.run,
        options.overrides,
        against=options.against,
        dry_run=options.dry_run,
        ask_again=options.ask_again,
    )
    if not options.dry_run:
        print_scores(folder)
    return 0


def _report(options: argparse.Namespace) -> int:
    from fast_ft.progress import note
    from fast_ft.report.write import write_comparison, write_report
    from fast_ft.rundir import RunDir

    if options.overrides:
        raise InputError(f"{options.overrides[0]!r}: a report takes run folders only.")
    folders = [RunDir.at(run) for run in options.runs]
    if len(folders) == 1:
        page = write_report(folders[0])
    else:
        page = write_comparison(folders, Path(options.output or "comparison.html"))
    note(f"{page} holds training rows and predictions: keep it to yourself")
    return 0


def _runs(options: argparse.Namespace) -> int:
    from fast_ft.show import print_runs
    from fast_ft.submit.ledger import read

    print_runs(read(options.root))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from fast_ft.progress import note
    from fast_ft.rundir import RunDir
    from fast_ft.submit import handin
    from fast_ft.submit.submit import print_verdicts, submit

    folder = RunDir.at(options.run)
    if options.public_score is not None:
        from fast_ft.submit.ledger import record

        for sentence in record(folder, options.public_score, options.at):
            note(sentence)
        if options.student_id is None:
            note(f"done: {options.public_score:g} noted for {folder.root}")
            return 0
    elif options.at is not None:
        raise InputError("--at: it is the time of a public score: give --public-score too")
    if options.student_id is not None:
        note(f"done: {submit(folder, options.student_id, Path(options.output))}")
        return 0
    print_verdicts(verdicts := handin.check(folder))
    return 2 if handin.broken(verdicts) else 0


def _reproduce(options: argparse.Namespace) -> int:
    from fast_ft.submit.reproduce import reproduce

    result = reproduce(
        Path(options.zip),
        train=options.train,
        test=options.test,
        model=options.model,
        output=Path(options.output) if options.output else None,
    )
    return 0 if result["adapter"] and result["identical"] == result["answers"] else 3


def _sweep(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from fast_ft.progress import note
    from fast_ft.sweep.sweep import Sweep

    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: give at least 1")
    output = Path(options.output) if options.output else None
    sweep = Sweep(recipe, options.recipe, hours=options.hours, output=output)
    if options.resume and not sweep.sweep_json.is_file():
        raise InputError(f"--resume: no sweep of this recipe was begun in {sweep.root}")
    with contextlib.redirect_stdout(sys.stderr):
        root = sweep.run(workers=options.workers, ray=options.ray)
    note(f"done: {root / 'best.yaml'}, {root / 'best'}")
    note(f"look at it: {root / 'report.html'} (it holds predictions: not to be shared)")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from fast_ft.doctor import doctor

    findings = doctor.examine()
    if options.json:
        print(json.dumps(doctor.as_json(findings), indent=2))
    else:
        doctor.print_findings(findings)
    return 0 if doctor.works(findings) else 3


def _schema(options: argparse.Namespace) -> int:
    from fast_ft.load import schema

    print(json.dumps(schema(), indent=2))
    return 0


#: Those that several processes can do together (ranks.py).
TOGETHER = (_run, _train)

COMMANDS = {
    "run": _run,
    "train": _train,
    "data": _data,
    "plan": _plan,
    "generate": _generate,
    "chat": _chat,
    "judge": _judge,
    "report": _report,
    "runs": _runs,
    "submit": _submit,
    "reproduce": _reproduce,
    "sweep": _sweep,
    "doctor": _doctor,
    "schema": _schema,
}
