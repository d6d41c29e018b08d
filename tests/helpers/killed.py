"""A command in a process that can be killed: forked from a server which has imported the libraries already."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cheap

ROOT = Path(__file__).parents[2]


def start(arguments: list[str], errors: Path, **environment: str) -> BaseProcess:
    """Start `python -m fast_ft ARGUMENTS` in the repository's root, its stderr appended to a file."""
    return start_function(run, arguments, str(errors), environment)


def start_function(function: Callable[..., None], *given: Any) -> BaseProcess:
    """Call a function of a test's module in a process of its own, with the environment as it is now."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed_imports"])
    process: BaseProcess = context.Process(target=_call, args=(dict(os.environ), function, given))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:  # for the server, which imports this file, where it is not there yet
        patch.setenv("PYTHONPATH", os.pathsep.join(dict.fromkeys(paths)))
        process.start()
    return process


def _call(environment: dict[str, str], function: Callable[..., None], given: tuple[Any, ...]) -> None:
    """In the child, whose environment is that of the server's start, in whichever test that was."""
    os.environ.clear()
    os.environ.update(environment)
    function(*given)


def finished(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m fast_ft ARGUMENTS` to its end; what it says is kept in a folder."""
    out, errors = folder / "stdout", folder / "stderr"
    process = start_function(run, arguments, str(errors), {}, str(out))
    process.join()
    status = process.exitcode if process.exitcode is not None else -1
    return subprocess.CompletedProcess(arguments, status, *(file.read_text("utf-8") for file in (out, errors)))


def run(arguments: list[str], errors: str, environment: dict[str, str], out: str | None = None) -> None:
    """In the child: what `python -m fast_ft` does, cheaply."""
    cheap.wait_for_no_disk()
    cheap.draw(truly=False)
    os.environ.update(environment)
    for name, stream in ((out or errors, 1), (errors, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    from fast_ft.cli.main import main

    sys.exit(main(arguments))


def run_until(touch: int, arguments: list[str], errors: str) -> None:
    """In the child: the same, but killed when it is about to touch the disk for the `touch`-th time."""
    import signal

    from fast_ft.common import atomic_files

    left = touch

    def before(what: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic_files.before = before
    run(arguments, errors, {})
