"""A command in a process of its own, within a limit of time, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_OFFLINE = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}


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
    with contextlib.ExitStack() as files:
        errors = files.enter_context(log.open("wb"))
        return subprocess.Popen(
            list(command), stdout=files.enter_context(out.open("wb")) if out else errors,
            stderr=errors if out else subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **_OFFLINE, **(more or {})},
        )  # fmt: skip


def wait(process: subprocess.Popen[bytes], timeout: float) -> int | str:
    """Wait for a started command; return its exit status, or that nothing came, and end it then."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"nothing after {timeout:.0f} s"
    finally:
        end(process)


class WaitingProcess:
    """A process that is started early, loads libraries, and then waits for its turn; see `wait_for_turn`.

    Libraries take longer to load than what is measured. Several processes load them side by side, and work in turn.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **_OFFLINE},
        )  # fmt: skip

    def run(self, timeout: float) -> int | str:
        """Let it work; return its exit status, or that nothing came within `timeout` seconds."""
        with contextlib.suppress(
            BrokenPipeError, subprocess.TimeoutExpired
        ):  # it has ended before its turn, and its status says why
            self._process.communicate(b"\n", timeout=timeout)
        if self._process.poll() is None:
            return f"nothing after {timeout:.0f} s"
        return self._process.returncode

    def end(self) -> None:
        """End it, with what it started, if it still runs."""
        end(self._process)
        self._log.close()


def wait_for_turn() -> None:
    """Wait in a process that a WaitingProcess started until it may work."""
    sys.stdin.readline()


@contextlib.contextmanager
def card_to_itself(*, beside_others: bool = False) -> Iterator[None]:
    """Hold the lock that the environment's GPU_LOCK names, where several measurements share a machine.

    `beside_others` is for work whose time does not count: those who ask for it share the lock, while nobody measures.
    """
    if (name := os.environ.get("GPU_LOCK")) is None:
        yield
        return
    import fcntl

    with Path(name).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH if beside_others else fcntl.LOCK_EX)
        yield


def end(process: subprocess.Popen[bytes]) -> None:
    """End a started command with all that it started, compilers above all, where it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
