"""The command line: its words, its errors, its exit status. What a command does is in cli/commands.py and
cli/run_commands.py.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fast_ft.cli import commands, run_commands
from fast_ft.cli.arguments import is_override, parse
from fast_ft.cli.commands import LOADING
from fast_ft.cli.parser import build_parser
from fast_ft.common import environment, garbage, out_of_memory, process_group, signals, streams
from fast_ft.common.console import note
from fast_ft.common.errors import BudgetMissed, InputError, nearest
from fast_ft.common.folders import PACKAGE
from fast_ft.common.redaction import redact_tracebacks
from fast_ft.common.text_safety import plain
from fast_ft.run.provenance import ELSEWHERE

COMMANDS = commands.COMMANDS | run_commands.COMMANDS

_SHORT = "End other programs, raise the limit that `ulimit -v` shows, or ask for less at a time."
_SHARED = re.compile(r"\.so\b|\.dylib|\.dll", re.IGNORECASE)
_NO_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}  #: of a file that a user named
#: By a disk, by its owner, or by a network's disk that went away.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN}


def own_process() -> int:
    """Run the command line of a process that is there for it alone: signals and tracebacks are set up too."""
    garbage.seldom()
    redact_tracebacks()
    if not environment.launched():  # of several processes, the first may be saving for all
        signals.end_in_time()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams.set_up()
    try:
        return _status(words)
    except BrokenPipeError:
        if not streams.reader_left():
            raise
        return streams.READER_LEFT
    finally:
        streams.finish()


def _status(words: list[str]) -> int:
    """Run one command, as one of several processes where a launcher says so, and return the exit status."""
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
        return _status_alone(words, place)
    finally:
        place.end()


def _status_alone(words: list[str], place: process_group.Ranks) -> int:
    """Run one command in the first process, and say in one message what went wrong, unless it is a bug."""
    parser, parsers = build_parser()
    if not words:
        parser.print_help()
        return 2
    name = ""
    try:
        name, rest = _command(parser, words)
        options = parse(parsers[name], rest)
        if place.size > 1 and name not in commands.TOGETHER:
            raise InputError(f"several processes (WORLD_SIZE={place.size}) train a recipe; {name} is for one")
        if name in LOADING:
            if sys.flags.optimize > 1:
                raise InputError(
                    "PYTHONOPTIMIZE=2 (python -OO) takes out the docstrings that transformers reads: unset it"
                )
            out_of_memory.check_address_space()
        with out_of_memory.explained("running this command", _SHORT):
            status = COMMANDS[name](options)
            sys.stdout.flush()  # what the disk or a reader refuses is said here, not by Python at its end
            return status
    except InputError as error:
        note(f"error: {error}")
        return 2
    except BudgetMissed as error:
        note(str(error))
        return 3
    except (KeyboardInterrupt, process_group.Lost):
        goes_on = "; the same command goes on from what was kept" if name in commands.GOES_ON else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    except (ImportError, OSError) as error:
        said = _unloadable(error) or _no_name(error) or _refused(error)
        if said is None:
            raise  # a bug
        note(f"error: {said}")
        return 2


def _unloadable(error: ImportError | OSError) -> str | None:
    """Return the sentence for a library that is not installed, or does not load here; None for any other error."""
    if isinstance(error, ImportError):
        name = error.name or ""
        part = name.removeprefix("fast_ft.").replace(".", "/")
        left_out = f"{part}/".startswith(ELSEWHERE) or f"{part}.py" in ELSEWHERE  # of a zip that was handed in
        if left_out and not any(path.exists() for path in (PACKAGE / part, PACKAGE / f"{part}.py")):
            return f"this copy of the program has no {name}, only what a run needs: install fast_ft"
        if name.startswith("fast_ft"):
            return None
    elif error.errno is not None or not _SHARED.search(str(error)):  # ctypes: a library that a library needs
        return None
    cause: BaseException = error
    while cause.__cause__ is not None:  # transformers' lazy modules say only that there was an error
        cause = cause.__cause__
    return (
        f"a library cannot be loaded here: {plain(str(cause))}. `python -m fast_ft doctor` compares what is installed "
        "with requirements.txt; `make .venv/run-ready` installs it again"
    )


def _no_name(error: ImportError | OSError) -> str | None:
    """Return the sentence for a name that no file can have; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _NO_NAMES:
        return None
    name = plain(str(error.filename))
    why = "too long" if error.errno == errno.ENAMETOOLONG else "a circle of links"
    return f"{name if len(name) < 80 else name[:77] + '...'}: this name is {why}. Check the spelling"


def _refused(error: ImportError | OSError) -> str | None:
    """Return the sentence for what a disk or its owner refuses; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    what = f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}"
    return f"{what}. Let this user read and write it, or free some space; then run the command again"


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
