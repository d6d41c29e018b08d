"""Who does the trials: processes of this machine, one for each GPU, or one or more on its CPU.

sweep/ray_workers.py has workers on other machines.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from fast_ft.common import environment, garbage, gpu
from fast_ft.sweep.trial_task import TaskRunner, TrialResult, TrialTask

GRACE = 8.0  #: seconds that interrupted workers have to save the step in hand, and idle ones to end


class WorkerPool(Protocol):
    """Workers, by number. A task is submitted to an idle one; `wait` says what came back."""

    def idle(self) -> list[int]:
        """Return the workers without a task."""

    def submit(self, worker: int, task: TrialTask) -> None:
        """Give an idle worker a task."""

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        """Return (worker, result) of each task that ended within `seconds`; None: the worker was lost and replaced."""

    def interrupt(self) -> None:
        """Stop all tasks in hand; the workers are idle then, and what the tasks had saved is kept."""

    def close(self) -> None:
        """End all workers."""


class LocalWorkers:
    """Processes of this machine, each with one GPU, or with its share of the cores. Their output goes to `logs`.

    Each process makes a runner with `make_runner`, which has to be importable by name, and gives it its tasks.
    """

    def __init__(self, count: int, logs: Path, make_runner: Callable[[], TaskRunner]) -> None:
        self._logs, self._make_runner = logs, make_runner
        self._gpus = gpu.visible_gpus()
        self._threads = max(1, (os.cpu_count() or 1) // count)
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._spawn(number) for number in range(count)]
        self._busy: set[int] = set()

    def idle(self) -> list[int]:
        """See WorkerPool."""
        return [number for number in range(len(self._workers)) if number not in self._busy]

    def submit(self, worker: int, task: TrialTask) -> None:
        """See WorkerPool."""
        self._busy.add(worker)
        with contextlib.suppress(OSError):  # a worker that died meanwhile: `wait` finds it
            self._workers[worker].pipe.send(task)

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        """See WorkerPool."""
        waiting = {self._workers[number].pipe: number for number in self._busy}
        found = []
        for pipe in wait(list(waiting), seconds):
            number = waiting[pipe]  # type: ignore[index]
            try:
                result: TrialResult | None = self._workers[number].pipe.recv()
            except (EOFError, OSError):
                result = None
                self._replace(number)
            self._busy.discard(number)
            found.append((number, result))
        return found

    def interrupt(self) -> None:
        """See WorkerPool. Each worker has GRACE seconds to save the step in hand; who needs longer is replaced."""
        for number in self._busy:
            self._workers[number].process.terminate()
        end = time.monotonic() + GRACE
        for number in list(self._busy):
            worker = self._workers[number]
            try:
                if worker.pipe.poll(max(0.0, end - time.monotonic())):
                    worker.pipe.recv()
                else:
                    self._replace(number)
            except (EOFError, OSError):
                self._replace(number)
            self._busy.discard(number)

    def close(self) -> None:
        """See WorkerPool. An idle worker ends by itself when its pipe is closed.

        One that is killed leaves a semaphore behind, and multiprocessing would warn of it as the sweep's last word.
        """
        for number, worker in enumerate(self._workers):
            worker.pipe.close()
            if number in self._busy:
                worker.process.kill()
        end = time.monotonic() + GRACE
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            worker.process.kill()
            worker.process.join()

    def _replace(self, number: int) -> None:
        self._workers[number].process.kill()
        self._workers[number].process.join()
        self._workers[number] = self._spawn(number)

    def _spawn(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, str(self._logs / f"worker-{number}.log"), self._make_runner),
            name=f"sweep-{number}", daemon=True,
        )  # fmt: skip
        with environment.during(self._variables(number)):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _variables(self, number: int) -> dict[str, str]:
        passive = {"OMP_WAIT_POLICY": "PASSIVE"}  # see environment.at_start
        if self._gpus:
            return passive | {"CUDA_VISIBLE_DEVICES": self._gpus[number % len(self._gpus)]}
        return passive | {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}


class _Worker:
    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe


def _serve(pipe: Connection, log: str, make_runner: Callable[[], TaskRunner]) -> None:
    """Be a worker: take tasks and give results until the driver closes the pipe or is gone."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal is the driver's to handle
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        """End this process with its driver: one that is killed in the middle of a trial leaves nobody behind."""
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()

    def stop(*_: object) -> None:
        """Raise KeyboardInterrupt at SIGTERM, as Ctrl-C does."""
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    garbage.seldom()
    runner = make_runner()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        result = runner.run(task)
        pipe.send(result)
        if result.traceback:
            return  # a CUDA context may be beyond repair: the driver starts another worker
