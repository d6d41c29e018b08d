"""The commands' options and help. What a command does is in cli/commands.py and cli/run_commands.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fast_ft.cli.arguments import Parser, Places, whole

_Raw = argparse.RawDescriptionHelpFormatter
_RECIPE = Places("RECIPE [key=value ...]", "recipe")
TOP = """\
options of RECIPE, run and quickstart:
  --stop-after STEPS    a preview: train STEPS steps, answer 10 prompts, and stop;
                        the command without it goes on from there
  --force-resume        go on from the last checkpoint, although model, data or
                        training keys have changed since

"""
OVERRIDES = """\
key=value, anywhere in the line, replaces the recipe's value: python -m fast_ft recipes/strong.yaml lora.r=32
"""
STATUS = """\
Exit status: 0 done; 1 a bug; 2 wrong input; 3 a budget is exceeded or a check failed; 130 interrupted;
141 the reader of its output left."""


RUNS = "runs"  #: where `runs` looks when no folder is named; it comes with the first run


class Usage(NamedTuple):
    """How a command is called. text: one line of help. description: what its own help says, in place of `text`."""

    text: str
    takes: Places
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    description: str = ""


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and that of each command in USAGES; `arguments.parse` reads with the latter."""
    program = "fast-ft" if Path(sys.argv[0]).stem == "fast-ft" else "python -m fast_ft"  # as it was typed
    parser = Parser(
        prog=program,
        usage=f"{program} RECIPE [key=value ...] [--stop-after STEPS] [--force-resume]\n       {program} COMMAND ...",
        description="A recipe goes in; a LoRA adapter and answers to prompts come out. The same command again goes on.",
        epilog=TOP + OVERRIDES + STATUS,
        formatter_class=_Raw,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND [WORD ...]")
    commands: dict[str, Parser] = {}
    for name, usage in USAGES.items():
        takes = usage.takes
        commands[name] = command = subparsers.add_parser(
            name, help=usage.text, description=usage.description or usage.text, formatter_class=_Raw,
            epilog=(OVERRIDES if takes.overrides else "") + STATUS,
            usage=f"{program} {name} {takes.usage} [options]".replace("  ", " "),
        )  # fmt: skip
        about = "a YAML file, such as recipes/quickstart.yaml" if takes is _RECIPE else None
        command.add_argument("words", nargs="*", metavar=takes.name, help=about if takes.most else argparse.SUPPRESS)
        command.set_defaults(command=name, places=takes)
        usage.add_options(command)
    return parser, commands


def _run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--stop-after", type=whole(1), metavar="STEPS",
        help="a preview: stop after STEPS training steps and answer 10 prompts; without it the command goes on",
    )  # fmt: skip
    _force_resume_options(parser)


def _init_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="the base model: a folder, or an id on the Hugging Face hub")
    add("--test", metavar="FILE", help="questions to answer after training")
    add("--output", metavar="FILE", help="the recipe (default: ROWS' name with .yaml, here)")
    parser.set_defaults(rows=None)


def _force_resume_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--force-resume", action="store_true",
        help="go on from the last checkpoint though model, data or training keys have changed since",
    )  # fmt: skip


def _json_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--show", type=whole(0), default=0, metavar="N", help="print N rows, trained and masked tokens apart")
    add("--row", metavar="ID", help="print this selected row")
    add("--list", action="store_true", help="list the selected rows, and those that were passed over, with prompts")
    add("--why", metavar="ID", help="say why this row is left out, or that it is taken")
    _json_options(parser)
    add("--explore", action="store_true", help="open the map of all rows, with sliders, in the browser")
    add(
        "--stand-in",
        type=whole(1),
        metavar="N",
        help="write N rows that are not trained on, with their answers, to --output: a test set of your own",
    )
    add("--output", metavar="FILE", help="with --explore: write the page to a file; with --stand-in: the rows")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", metavar="CARD", help="plan for this card, such as t4, or a memory size such as 8GiB")
    add("--num-processes", type=whole(1), default=1, metavar="N", help="plan for N cards that train together")
    _json_options(parser)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--grid",
        action="store_true",
        help="a pred file for each point, in RUN_DIR/grid, as in: --grid temperature=0.3,0.7 top_p=0.8,0.9",
    )
    add("--prompt", metavar="TEXT", help="answer this text, and print the answer; the run's own answers stay")
    add("--prompts", metavar="FILE", help="answer these prompts into the file --output; the run's own answers stay")
    add("--output", metavar="FILE", help="with --prompts or --prompt: the file of the answers, in pred.json's form")


def _judge_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print what would be asked and what it costs; ask nothing")
    add("--against", metavar="RUN_DIR", help="judge this run too, and tell the difference from noise")
    add("--ask-again", action="store_true", help="ask again where a kept reply holds no score")


def _report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", metavar="FILE", help="of several runs: the page (default: comparison.html)")


def _runs_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(root=RUNS)
    add = parser.add_argument
    add("--all", action="store_true", help="every run, with every setting that differs between runs of its recipe")
    _json_options(parser)
    add("--prune", action="store_true", help="delete the runs that failed or did not finish training, after a question")
    add("--yes", action="store_true", help="with --prune: delete without the question")


def _export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", required=True, choices=("merged", "gguf", "ollama", "hub"), help="what to write")
    add("--output", metavar="FOLDER", help="where it goes (default: RUN_DIR/export)")
    add("--base", metavar="MODEL", help="merge into this copy of the base, such as its 16-bit one")
    add("--dtype", default="float16", metavar="DTYPE", help="merged weights: float16, bfloat16 or float32")
    add("--outtype", default="q8_0", metavar="TYPE", help="GGUF's weights: f16, q8_0 (default) or q4_k_m")
    add("--repo", metavar="OWNER/NAME", help="hub: the repository")
    add("--merged", action="store_true", help="hub: the merged model, in place of the adapter")
    add("--push", action="store_true", help="hub: upload; without it the files are listed only")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--student-id", metavar="ID", help="write ID_hw5.zip; without it the rules are checked only")
    add("--output", default=".", metavar="FOLDER", help="where the zip goes (default: here)")
    add("--public-score", type=float, metavar="SCORE", help="note what JudgeBoi said; `runs` shows it")
    add("--at", metavar="TIME", help="when it said so (default: now), in Taipei's time")


def _reproduce_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", required=True, metavar="DATA", help="the training rows")
    add("--test", required=True, metavar="FILE", help="the prompts")
    add("--model", metavar="FOLDER", help="your folder of the base model, needed where the run's was a folder")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="your folder of the tokenizer, needed where the recipe names a folder for it",
    )
    add("--output", metavar="FOLDER", help="the run folder (default: in runs/reproduced)")


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hours", type=float, metavar="H", help="hours of the whole sweep, its earlier commands included")
    add("--workers", type=whole(1), metavar="N", help="processes at a time (default: one for each GPU, or 1)")
    add("--ray", metavar="ADDRESS", help="workers on a Ray cluster: its address, auto, or local")
    add("--output", metavar="FOLDER", help="the sweep's folder (default: in runs/)")
    add("--resume", action="store_true", help="go on with a sweep; an error where none was begun")


def _schema_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="the same as a page to read: docs/recipe-reference.md")


#: Each command, in the order of the help.
USAGES = {
    "run": Usage("run a recipe: train, then answer the prompts", _RECIPE, _run_options),
    "train": Usage("run a recipe up to its adapter", _RECIPE, _force_resume_options),
    "quickstart": Usage(
        "run recipes/quickstart.yaml: all of it on a CPU, with a small base model that is included",
        Places("[key=value ...]", "", least=0, most=0),
        _run_options,
    ),
    "init": Usage(
        "write a recipe for your own rows, its paths filled in",
        Places("[ROWS]", "rows", least=0),
        _init_options,
        "Write a recipe for your own rows: recipes/own-data.yaml with the paths filled in, each key explained. What is "
        "wrong with the rows is said first. A file that exists is never written over.",
    ),
    "data": Usage("show which rows are selected, and why", _RECIPE, _data_options),
    "plan": Usage("show what training will take: steps, tokens, memory, minutes", _RECIPE, _plan_options),
    "generate": Usage(
        "answer prompts again with a run's adapter",
        Places("RUN_DIR [key=value ...]", "run"),  # data.test=FILE, and a grid's temperature=0.3,0.7
        _generate_options,
        "Answer the run's prompts again, with other generate.* keys: into RUN_DIR/pred.json; the former answers are "
        "kept beside, as pred-DIGEST.json. The recipe's own command makes the recipe's answers again. Other prompts, "
        "given as data.test=FILE, are answered into a file of their own, RUN_DIR/pred-FILE-DIGEST.json.",
    ),
    "chat": Usage("talk to a run's adapter", Places("RUN_DIR [generate.key=value ...]", "run")),
    "judge": Usage(
        "score a run's answers, again or by another judge",
        Places("RUN_DIR [judge.key=value ...]", "run"),
        _judge_options,
        "Score RUN_DIR/pred.json into scores.json; another judge's scores are kept beside, as scores-DIGEST.json. With "
        "data.test=FILE, score the answers that `generate RUN_DIR data.test=FILE` made, into a file of their own.",
    ),
    "report": Usage(
        "write a run's report.html, or one page that compares runs",
        Places("RUN_DIR [RUN_DIR ...]", "runs", most=1000),
        _report_options,
    ),
    "watch": Usage(
        "open a page that shows how far a run is: loss, speed, memory, time left",
        Places("RUN_DIR", "run"),
        description="Open a page that shows how far a run is: loss, speed, memory and time left, from the files in its "
        "folder. It is served on this machine's loopback only, until Ctrl-C.",
    ),
    "runs": Usage(
        "list the runs in a folder (default: runs), one a line, and what differs between them",
        Places("[FOLDER]", "root", least=0),
        _runs_options,
    ),
    "export": Usage(
        "write a run as a merged model, as GGUF, for Ollama or for the hub",
        Places("RUN_DIR", "run"),
        _export_options,
        "Write a finished run as a model that other programs load. Each file is loaded afresh and compared with the "
        "adapter on its base before it is kept. docs/serving.md has the commands of vLLM, llama.cpp and Ollama.",
    ),
    "submit": Usage("check a run against the homework's rules, and pack it", Places("RUN_DIR", "run"), _submit_options),
    "reproduce": Usage(
        "repeat a submitted run, and say what differs (then the status is 3)",
        Places("ZIP", "zip"),
        _reproduce_options,
    ),
    "sweep": Usage("try many recipes within some hours; the same command again goes on", _RECIPE, _sweep_options),
    "doctor": Usage(
        "check driver, card, kernels, package versions, disk and network, and try a small run",
        Places("", "", least=0, most=0),
        _json_options,
        "check driver, card, kernels, package versions, disk and network, and try a small run; the status is 3 where "
        "something would break a run",
    ),
    "schema": Usage(
        "print every key of a recipe, with its limits and its default, as JSON Schema",
        Places("", "", least=0, most=0),
        _schema_options,
    ),
}
