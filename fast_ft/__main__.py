"""The command line, and nothing else. Modules are imported when their command runs, so `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fast_ft.errors import BudgetMissed, InputError, nearest

if TYPE_CHECKING:
    from fast_ft.prepare import Prepared
    from fast_ft.recipe import Recipe

_Raw = argparse.RawDescriptionHelpFormatter
EPILOG = """\
key=value, anywhere, stands in place of the recipe's: python -m fast_ft recipes/strong.yaml lora.r=32
Exit status: 0 done; 1 a bug; 2 wrong input; 3 a budget or a bar was missed; 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait take shared vCPUs from those that work: a step on 2 cores beside one busy
    # process took 0.67 s with spinning and 0.12 s without. Must stand before torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = build_parser()
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        if not words[0].endswith((".yaml", ".yml")) and "/" not in words[0]:
            print(
                f"error: {words[0]!r} is no recipe (.yaml) and no command{nearest(words[0], COMMANDS)}", file=sys.stderr
            )
            return 2
        words.insert(0, "run")
    # argparse takes a list of words in one piece only; overrides may stand anywhere.
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    options = parser.parse_args([word for word in words if word not in overrides])
    options.overrides = overrides
    if not hasattr(options, "call"):
        parser.print_help()
        return 2
    try:
        return options.call(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BudgetMissed as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: one subcommand for each entry of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="python -m fast_ft",
        usage="python -m fast_ft RECIPE [key=value ...]\n       python -m fast_ft COMMAND ...",
        description="One recipe in; a LoRA adapter and answered prompts out. The same command again goes on.",
        epilog=EPILOG,
        formatter_class=_Raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND ...")

    def add(name: str, text: str, takes: str = "RECIPE [key=value ...]") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=_Raw,
            usage=f"python -m fast_ft {name} {takes} [options]".replace("  ", " "),
        )  # fmt: skip
        command.set_defaults(call=COMMANDS[name])
        if takes.startswith("RECIPE"):
            command.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")
        return command

    run = add("run", "run a recipe: train, then answer the prompts")
    run.add_argument(
        "--stop-after", type=int, metavar="STEPS",
        help="a taste: stop after so many training steps and answer 10 prompts; without it the same command goes on",
    )  # fmt: skip
    add("train", "run a recipe up to its adapter")
    data = add("data", "show which rows are selected, and why")
    data.add_argument("--show", type=int, default=0, metavar="N", help="print N rows, trained and masked tokens apart")
    data.add_argument("--row", metavar="ID", help="print this selected row")
    data.add_argument("--json", action="store_true", help="one JSON object on stdout")
    data.add_argument("--explore", action="store_true", help="open the map of all rows, with sliders, in the browser")
    data.add_argument("--output", metavar="FILE", help="with --explore: write the page to a file instead")
    plan = add("plan", "show what training will take: steps, tokens, memory, minutes")
    plan.add_argument("--gpu", metavar="CARD", help="plan for this card, such as t4, without having it")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    generate = add("generate", "answer the prompts again with a run's adapter", takes="RUN_DIR [key=value ...]")
    generate.add_argument("run", metavar="RUN_DIR")
    generate.add_argument(
        "--grid",
        action="store_true",
        help="a pred file for each point, as in: --grid temperature=0.3,0.7 top_p=0.8,0.9",
    )
    chat = add("chat", "talk to a run's adapter", takes="RUN_DIR [generate.key=value ...]")
    chat.add_argument("run", metavar="RUN_DIR")
    judge = add("judge", "score a run's answers, again or by another judge", takes="RUN_DIR [judge.key=value ...]")
    judge.add_argument("run", metavar="RUN_DIR")
    judge.add_argument(
        "--dry-run", action="store_true", help="print what would be asked and what it costs; ask nothing"
    )
    judge.add_argument("--against", metavar="RUN_DIR", help="judge this run too, and tell the difference from noise")
    judge.add_argument("--ask-again", action="store_true", help="ask again where a kept reply holds no score")
    report = add("report", "write a run's report.html, or one page that compares runs", takes="RUN_DIR [RUN_DIR ...]")
    report.add_argument("runs", metavar="RUN_DIR", nargs="+")
    report.add_argument("--output", metavar="FILE", help="of several runs: the page (default: comparison.html)")
    runs = add("runs", "list the run folders and what differs between them", takes="[FOLDER]")
    runs.add_argument("root", nargs="?", default="runs", metavar="FOLDER")
    submit = add("submit", "check a run against the homework's rules, and pack it", takes="RUN_DIR")
    submit.add_argument("run", metavar="RUN_DIR")
    submit.add_argument("--student-id", metavar="ID", help="write ID_hw5.zip; without it the rules are checked only")
    submit.add_argument("--output", default=".", metavar="FOLDER", help="where the zip goes (default: here)")
    submit.add_argument("--public-score", type=float, metavar="SCORE", help="note what JudgeBoi said; `runs` shows it")
    submit.add_argument("--at", metavar="TIME", help="when it said so (default: now), in Taipei's time")
    again = add("reproduce", "do a submitted run again, and tell what differs; status 3: something does", takes="ZIP")
    again.add_argument("zip", metavar="ZIP")
    again.add_argument("--train", required=True, metavar="DATA", help="the training rows")
    again.add_argument("--test", required=True, metavar="FILE", help="the prompts")
    again.add_argument("--model", metavar="FOLDER", help="the base model, where it lies elsewhere here")
    again.add_argument("--output", metavar="FOLDER", help="the run folder (default: in runs/reproduced)")
    add("schema", "print the recipe's JSON Schema", takes="")
    return parser


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

    if until == "pred" and options.stop_after is not None:
        return _taste(options, recipe)
    with contextlib.redirect_stdout(sys.stderr):  # the libraries' banners; stdout is for results
        folder = run(recipe, options.recipe, until=until)
    if until == "pred" and folder.scores.is_file():
        from fast_ft.show_scores import print_scores

        print_scores(folder)
    note(f"done: {folder.root if until == 'pred' else folder.adapter}")
    note(f"look at it: {folder.report} (it holds training rows: not to be shared)")
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

    prepared = prepare(recipe, tokens=False)
    if options.json:
        print(json.dumps(selection_json(prepared), indent=2, ensure_ascii=False))
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

    content = describe(recipe, prepare(recipe), options.gpu)
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


def _schema(options: argparse.Namespace) -> int:
    from fast_ft.load import schema

    print(json.dumps(schema(), indent=2))
    return 0


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
    "schema": _schema,
}

if __name__ == "__main__":
    sys.exit(main())
