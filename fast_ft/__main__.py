"""The command line: its words, its errors, its exit status. What a command does is in commands.py."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from fast_ft import memory, ranks
from fast_ft.commands import COMMANDS, TOGETHER
from fast_ft.errors import BudgetMissed, InputError, nearest
from fast_ft.progress import note
from fast_ft.redact import redact_tracebacks

_Raw = argparse.RawDescriptionHelpFormatter
EPILOG = """\
key=value, anywhere, stands in place of the recipe's: python -m fast_ft recipes/strong.yaml lora.r=32
Exit status: 0 done; 1 a bug; 2 wrong input; 3 a budget or a bar was missed; 130 interrupted."""
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}  #: by the disk or its owner


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait take shared vCPUs from those that work: a step on 2 cores beside one busy
    # process took 0.67 s with spinning and 0.12 s without. Must stand before torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        place = ranks.enter()
    except InputError as error:
        note(f"error: {error}")
        return 2
    if not place.first:
        from fast_ft.follow import follow

        return follow(place)
    try:
        return _main(words, place)
    finally:
        place.end()


def _main(words: list[str], place: ranks.Ranks) -> int:
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
        if place.size > 1 and options.call not in TOGETHER:
            raise InputError(f"several processes (WORLD_SIZE={place.size}) train a recipe; {words[0]} is for one")
        with memory.explained("running this command", "End other programs, or ask for less at a time."):
            return options.call(options)
    except InputError as error:
        note(f"error: {error}")
        return 2
    except BudgetMissed as error:
        note(str(error))
        return 3
    except (KeyboardInterrupt, ranks.Lost):
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in _REFUSED:
            raise  # a bug
        what = f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}"
        note(f"error: {what}. Let this user read and write it, or free some space; then run the command again")
        return 2


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
    train = add("train", "run a recipe up to its adapter")
    for command in (run, train):
        command.add_argument(
            "--force-resume", action="store_true",
            help="go on from the last checkpoint though model, data or training keys have changed since",
        )  # fmt: skip
    data = add("data", "show which rows are selected, and why")
    data.add_argument("--show", type=int, default=0, metavar="N", help="print N rows, trained and masked tokens apart")
    data.add_argument("--row", metavar="ID", help="print this selected row")
    data.add_argument("--json", action="store_true", help="one JSON object on stdout")
    data.add_argument("--explore", action="store_true", help="open the map of all rows, with sliders, in the browser")
    data.add_argument("--output", metavar="FILE", help="with --explore: write the page to a file instead")
    plan = add("plan", "show what training will take: steps, tokens, memory, minutes")
    plan.add_argument("--gpu", metavar="CARD", help="plan for this card, such as t4, without having it")
    plan.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="plan for N cards that train together (torchrun)"
    )
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
    again.add_argument("--model", metavar="FOLDER", help="the base model's folder, needed where it was one there")
    again.add_argument("--tokenizer", metavar="FOLDER", help="the same of the tokenizer, where the recipe names one")
    again.add_argument("--output", metavar="FOLDER", help="the run folder (default: in runs/reproduced)")
    sweep = add("sweep", "try many recipes within some hours; the same command again goes on")
    sweep.add_argument("--hours", type=float, metavar="H", help="all in all, earlier commands of this sweep included")
    sweep.add_argument("--workers", type=int, metavar="N", help="processes at a time (default: one for each GPU, or 1)")
    sweep.add_argument("--ray", metavar="ADDRESS", help="workers on a Ray cluster: its address, auto, or local")
    sweep.add_argument("--output", metavar="FOLDER", help="the sweep's folder (default: in runs/)")
    sweep.add_argument("--resume", action="store_true", help="go on with a sweep; an error where none was begun")
    doctor = add("doctor", "look at driver, card, versions, room and network, and try a small run here", takes="")
    doctor.description = f"{doctor.description}; status 3: something would break a run"
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add("schema", "print the recipe's JSON Schema", takes="")
    return parser


if __name__ == "__main__":
    redact_tracebacks()
    sys.exit(main())
