"""A command in a process of its own, within a limit of time, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_process(
    command: Sequence[str], log: Path, timeout: float, out: Path | None = None, more: Mapping[str, str] | None = None
) -> int | str:
    """Run a command without the hub; return its exit status, or that nothing came within `timeout` seconds.

    What it prints goes into `log`, what goes to stdout into `out` if that is given. `more` is added to the environment.
    It is ended with all processes that it started where it takes too long, or where this one is interrupted.
    """
    return wait(start(command, log, out, more), timeout)


def start(
    command: Sequence[str], log: Path, out: Path | None = None, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command as `run_process` does; `wait` must follow."""
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.ExitStack() as files:
        errors = files.enter_context(log.open("wb"))
        return subprocess.Popen(
            list(command), stdout=files.enter_context(out.open("wb")) if out else errors,
            stderr=errors if out else subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **offline, **(more or {})},
        )  # fmt: skip


def wait(process: subprocess.Popen[bytes], timeout: float) -> int | str:
    """Wait for a started command; return its exit status, or that nothing came, and end it then."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"nothing after {timeout:.0f} s"
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a started command with all that it started, compilers above all, where it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
