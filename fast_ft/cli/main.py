"""The command line: its words, its errors, its exit status. What a command does is in cli/commands.py."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fast_ft.cli.arguments import Places, is_override, parse
from fast_ft.cli.commands import COMMANDS, TOGETHER
from fast_ft.common import environment, out_of_memory, process_group, signals, streams
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError, nearest
from fast_ft.common.redaction import redact_tracebacks
from fast_ft.common.text_safety import plain

_Raw = argparse.RawDescriptionHelpFormatter
_RECIPE = Places("RECIPE [key=value ...]", "recipe")
_RUN = Places("RUN_DIR", "run")
_RUN_ANSWER = Places("RUN_DIR [key=value ...]", "run")  # data.test=FILE, and a grid's temperature=0.3,0.7
_RUN_CHAT = Places("RUN_DIR [generate.key=value ...]", "run")
_RUN_JUDGE = Places("RUN_DIR [judge.key=value ...]", "run")
_RUNS = Places("RUN_DIR [RUN_DIR ...]", "runs", most=1000)
_FOLDER = Places("[FOLDER]", "root", least=0)
_ZIP = Places("ZIP", "zip")
_NOTHING = Places("", "", least=0, most=0)
EPILOG = """\
key=value, anywhere, stands in place of the recipe's: python -m fast_ft recipes/strong.yaml lora.r=32
Exit status: 0 done; 1 a bug; 2 wrong input; 3 a budget or a bar was missed; 130 interrupted;
141 the reader of its output left."""
_SHORT = "End other programs, raise the limit that `ulimit -v` shows, or ask for less at a time."
_SHARED = re.compile(r"\.so\b|\.dylib|\.dll", re.IGNORECASE)
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}  #: by the disk or its owner


def own_process() -> int:
    """Run the command line of a process that is there for it alone: signals and tracebacks are set up too."""
    redact_tracebacks()
    if not environment.launched():  # of several processes, the first may be saving for all
        signals.end_in_time()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams.set_up()
    try:
        return _ranked(words)
    except BrokenPipeError:
        if not streams.reader_left():
            raise
        return streams.READER_LEFT
    finally:
        streams.finish()


def _ranked(words: list[str]) -> int:
    environment.at_start()
    try:
        place = process_group.enter()
    except InputError as error:
        note(f"error: {error}")
        return 2
    if not place.first:
        from fast_ft.train.worker import follow

        return follow(place)
    try:
        return _main(words, place)
    finally:
        place.end()


def _main(words: list[str], place: process_group.Ranks) -> int:
    parser, commands = build_parser()
    if not words:
        parser.print_help()
        return 2
    try:
        name, rest = _command(parser, words)
        options = parse(commands[name], rest)
    except InputError as error:
        note(f"error: {error}")
        return 2
    try:
        if place.size > 1 and options.call not in TOGETHER:
            raise InputError(f"several processes (WORLD_SIZE={place.size}) train a recipe; {name} is for one")
        with out_of_memory.explained("running this command", _SHORT):
            status = options.call(options)
            sys.stdout.flush()  # what the disk or a reader refuses is said here, not by Python at its end
            return status
    except InputError as error:
        note(f"error: {error}")
        return 2
    except BudgetMissed as error:
        note(str(error))
        return 3
    except (KeyboardInterrupt, process_group.Lost):
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except ImportError as error:
        if (error.name or "").startswith("fast_ft"):
            raise  # a bug
        note(f"error: {_unloadable(error)}")
        return 2
    except OSError as error:
        if error.errno is None and _SHARED.search(str(error)):  # ctypes: a library that a library needs
            note(f"error: {_unloadable(error)}")
            return 2
        if error.errno not in _REFUSED:
            raise  # a bug
        what = f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}"
        note(f"error: {what}. Let this user read and write it, or free some space; then run the command again")
        return 2


def _unloadable(error: Exception) -> str:
    """Return the sentence for a library that is not installed, or does not load here."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # transformers' lazy modules say only that there was an error
        cause = cause.__cause__
    return (
        f"a library cannot be loaded here: {plain(str(cause))}. `python -m fast_ft doctor` compares what is installed "
        "with requirements.txt; `make .venv/run-ready` installs it anew"
    )


def _command(parser: argparse.ArgumentParser, words: list[str]) -> tuple[str, list[str]]:
    """Return the command and the words behind it; a recipe alone is run."""
    first = words[0]
    if first in COMMANDS:
        return first, words[1:]
    if first in ("-h", "--help"):
        parser.parse_args([first])  # prints the help and ends
    if first.startswith("-") and first != "-":
        raise InputError(f"{first}: the command or the recipe comes first, and its options behind it")
    if is_override(first) and (named := [word for word in words if word in COMMANDS]):
        raise InputError(f"{named[0]}: the command comes first, and {first} behind it")
    if not (first.endswith((".yaml", ".yml")) or "/" in first or is_override(first) or Path(first).is_file()):
        raise InputError(f"{first!r} is no recipe (.yaml) and no command{nearest(first, COMMANDS)}")
    return "run", words


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and that of each command in COMMANDS; `parse` reads with the latter."""
    parser = argparse.ArgumentParser(
        prog="python -m fast_ft",
        usage="python -m fast_ft RECIPE [key=value ...]\n       python -m fast_ft COMMAND ...",
        description="One recipe in; a LoRA adapter and answered prompts out. The same command again goes on.",
        epilog=EPILOG,
        formatter_class=_Raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND ...")
    parsers: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, text: str, takes: Places = _RECIPE) -> argparse.ArgumentParser:
        parsers[name] = command = commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=_Raw,
            usage=f"python -m fast_ft {name} {takes.usage} [options]".replace("  ", " "),
        )  # fmt: skip
        about = "a YAML file, such as recipes/quickstart.yaml" if takes is _RECIPE else None
        command.add_argument("words", nargs="*", metavar=takes.name, help=about if takes.most else argparse.SUPPRESS)
        command.set_defaults(call=COMMANDS[name], places=takes)
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
    generate = add(
        "generate", "answer prompts again with a run's adapter", takes=Places("RUN_DIR [key=value ...]", "run")
    )
    generate.description = (
        "Answer the run's prompts again, with other generate.* keys: into RUN_DIR/pred.json; the former answers are "
        "kept beside, as pred-DIGEST.json. The recipe's own command makes the recipe's answers again. Other prompts, "
        "given as data.test=FILE, are answered into a file of their own, RUN_DIR/pred-FILE-DIGEST.json."
    )
    generate.add_argument(
        "--grid",
        action="store_true",
        help="a pred file for each point, as in: --grid temperature=0.3,0.7 top_p=0.8,0.9",
    )
    add("chat", "talk to a run's adapter", _RUN_CHAT)
    judge = add(
        "judge",
        "score a run's answers, again or by another judge",
        takes=Places("RUN_DIR [judge.key=value ...]", "run"),
    )
    judge.description = (
        "Score RUN_DIR/pred.json into scores.json; another judge's scores are kept beside, as scores-DIGEST.json. With "
        "data.test=FILE, score the answers that `generate RUN_DIR data.test=FILE` made, into a file of their own."
    )
    judge.add_argument(
        "--dry-run", action="store_true", help="print what would be asked and what it costs; ask nothing"
    )
    judge.add_argument("--against", metavar="RUN_DIR", help="judge this run too, and tell the difference from noise")
    judge.add_argument("--ask-again", action="store_true", help="ask again where a kept reply holds no score")
    report = add("report", "write a run's report.html, or one page that compares runs", _RUNS)
    report.add_argument("--output", metavar="FILE", help="of several runs: the page (default: comparison.html)")
    runs = add("runs", "list the run folders and what differs between them", _FOLDER)
    runs.set_defaults(root="runs")
    submit = add("submit", "check a run against the homework's rules, and pack it", _RUN)
    submit.add_argument("--student-id", metavar="ID", help="write ID_hw5.zip; without it the rules are checked only")
    submit.add_argument("--output", default=".", metavar="FOLDER", help="where the zip goes (default: here)")
    submit.add_argument("--public-score", type=float, metavar="SCORE", help="note what JudgeBoi said; `runs` shows it")
    submit.add_argument("--at", metavar="TIME", help="when it said so (default: now), in Taipei's time")
    again = add("reproduce", "do a submitted run again, and tell what differs; status 3: something does", _ZIP)
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
    doctor = add("doctor", "look at driver, card, versions, room and network, and try a small run here", _NOTHING)
    doctor.description = f"{doctor.description}; status 3: something would break a run"
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add("schema", "print the recipe's JSON Schema", _NOTHING)
    return parser, parsers
