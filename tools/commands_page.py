"""python -m tools.commands_page > docs/commands.md: the page of all commands, from what `--help` says of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from fast_ft.cli.parser import STATUS, USAGES, build_parser

PROGRAM = "python -m fast_ft"
INTRO = """\
# The command line

    python -m fast_ft recipes/quickstart.yaml lora.r=32   # run a recipe, or go on where it stopped
    python -m fast_ft data recipes/quickstart.yaml        # a command, and what it takes

RECIPE is a YAML file, and RUN_DIR is the folder of a run. `key=value`, anywhere in the line, replaces [the recipe's
value](recipes.md). Where fast_ft was installed by pip, `fast-ft` does the same as `python -m fast_ft`. `--help` behind
a command prints what this page says of it.
"""
#: Where a command is described at length.
MORE = {
    "run": "recipes.md", "train": "recipes.md", "quickstart": "quickstart.md", "init": "data.md",
    "data": "data.md#choosing-rows", "plan": "homework.md#minutes-on-a-t4",
    "generate": "recipes.md#other-answers-from-a-finished-run", "chat": "recipes.md#other-answers-from-a-finished-run",
    "judge": "judging.md", "report": "quickstart.md#the-report", "watch": "quickstart.md#the-report",
    "runs": "recipes.md#many-runs", "export": "serving.md", "submit": "homework.md#handing-in",
    "reproduce": "homework.md#reproducing-a-run", "sweep": "sweeps.md", "doctor": "reliability.md#doctor",
    "schema": "recipe-reference.md",
}  # fmt: skip


def page() -> str:
    """Return the page."""
    commands = build_parser()[1]
    lines = [INTRO, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {usage.text} |" for name, usage in USAGES.items()]
    lines += ["", "| exit status | what it means |", "|---|---|"]
    lines += [f"| {status} | {meaning} |" for status, meaning in re.findall(r"(\d+) ([^;.]+)[;.]", STATUS)]
    for name, usage in USAGES.items():
        text = usage.description or usage.text
        lines += [
            "", f"## {name}", "", f"    {PROGRAM} {name} {usage.takes.usage}".rstrip(), "",
            f"{text[0].upper()}{text[1:].rstrip('.')}. [More]({MORE[name]}).",
        ]  # fmt: skip
        if options := [*_options(commands[name])]:
            lines += ["", "| option | what it does |", "|---|---|", *options]
    return "\n".join(lines)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a row of the table for each option of a command, but for --help, which all have."""
    for action in parser._actions:  # argparse has no public list of them
        if action.option_strings and action.dest != "help":
            takes = f" {action.metavar}" if isinstance(action.metavar, str) else ""
            told = f": {', '.join(map(str, action.choices))}" if action.choices else ""
            told += " (required)" if action.required else ""
            yield f"| `{action.option_strings[-1]}{takes}` | {action.help}{told} |"


if __name__ == "__main__":
    print(page())
