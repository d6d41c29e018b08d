"""Workers on a Ray cluster: one plain actor for each GPU, or for each CPU core where there are none.

Actors may sit on other hosts, so nothing is shared but bytes: a task brings the validation set and, where its training
was done before, that run's adapter; the run folder comes back as a tar with its digest. The data and model that the
recipe names must be reachable by the same names everywhere. Ray is imported here alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast_ft.common import atomic_files, environment
from fast_ft.common.errors import InputError
from fast_ft.common.redaction import redacted
from fast_ft.recipe.loader import digest, resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir
from fast_ft.sweep.trial_task import TaskRunner, TrialResult, TrialTask

_STATE = ("optimizer.safetensors", "adapter.safetensors")  # checkpoints stay with the worker


class RayWorkers:
    """One actor for each GPU (else CPU core) of the cluster at `address`; "local" starts a cluster of `count` here."""

    def __init__(self, address: str, count: int | None, make_runner: Callable[[], TaskRunner]) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError(f"--ray needs Ray ({error}): pip install -r requirements-ray.txt") from None
        self._ray, self._make_runner = ray, make_runner
        environment.for_ray()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if address == "local":
                ray.init(num_cpus=count or os.cpu_count(), include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address=address, log_to_driver=False)
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process at once
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--ray {address}: no cluster answers there ({error}). `ray start --head` makes one."
            ) from None
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self._options = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
        self._actors = [self._spawn() for _ in range(min(gpus or cpus, count or 10_000))]
        self._tasks: dict[Any, tuple[int, TrialTask]] = {}

    def _spawn(self) -> Any:
        return self._ray.remote(**self._options)(RayActor).remote(str(Path.cwd()), self._make_runner)

    def idle(self) -> list[int]:
        """See WorkerPool."""
        busy = {worker for worker, _ in self._tasks.values()}
        return [number for number in range(len(self._actors)) if number not in busy]

    def submit(self, worker: int, task: TrialTask) -> None:
        """See WorkerPool."""
        test = task.recipe.data.test
        inputs = {"test": Path(test).read_bytes() if test else b""}
        if task.trained is not None:
            inputs["trained"] = pack(task.trained)
        self._tasks[self._actors[worker].run.remote(task, inputs)] = (worker, task)

    def wait(self, seconds: float) -> list[tuple[int, TrialResult | None]]:
        """See WorkerPool."""
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        found: list[tuple[int, TrialResult | None]] = []
        for reference in ready:
            worker, task = self._tasks.pop(reference)
            try:
                result, packed, digest = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:  # raised by RayActor.run: its text is the traceback
                found.append((worker, TrialResult(problem="a bug in a Ray worker", traceback=redacted(str(error)))))
                continue
            except self._ray.exceptions.RayError:  # the process, its host or its way here is gone
                self._replace(worker)
                found.append((worker, None))
                continue
            if packed and hashlib.sha256(packed).hexdigest() != digest:
                found.append((worker, None))
                continue
            if packed:
                unpack(packed, task.root)
                _as_driver_knows(task.root, task.recipe)
            found.append((worker, result))
        return found

    def interrupt(self) -> None:
        """See WorkerPool. An actor in the middle of a call can only be ended."""
        for worker, _ in list(self._tasks.values()):
            self._replace(worker)
        self._tasks.clear()

    def close(self) -> None:
        """See WorkerPool."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    def _replace(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._spawn()


class RayActor:
    """An actor: a runner of tasks in a folder of its own."""

    def __init__(self, directory: str, make_runner: Callable[[], TaskRunner]) -> None:
        if Path(directory).is_dir():
            os.chdir(directory)  # recipes' paths are relative to it
        self._runner = make_runner()
        self._folder = Path(tempfile.mkdtemp(prefix="fast_ft-sweep-"))

    def run(self, task: TrialTask, inputs: dict[str, bytes]) -> tuple[TrialResult, bytes, str]:
        """Do a task on files of this host; return the result, and the run folder as a tar with its digest."""
        recipe, root = task.recipe, self._folder / task.root.name
        data = recipe.data
        if inputs["test"]:
            test = self._folder / f"test-{hashlib.sha256(inputs['test']).hexdigest()[:16]}.json"
            atomic_files.write_bytes(test, inputs["test"])
            data = data.model_copy(update={"test": str(test)})
        recipe = recipe.model_copy(update={"output_dir": str(root), "data": data})
        trained = None
        if "trained" in inputs:
            trained = self._folder / "trained"
            unpack(inputs["trained"], trained)
        result = self._runner.run(replace(task, recipe=recipe, trained=trained))
        packed = pack(root) if root.is_dir() and result.problem is None else b""
        if (root / "pred.json").is_file():
            shutil.rmtree(root)  # it lies with the driver now
        return result, packed, hashlib.sha256(packed).hexdigest()


def pack(root: Path) -> bytes:
    """Return a run folder as a tar, without checkpoints."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.name not in _STATE and not path.name.startswith("."):
                tar.add(path, str(path.relative_to(root)))
    return buffer.getvalue()


def unpack(packed: bytes, root: Path) -> None:
    """Put a packed folder in place of what is at `root`. A member that would leave it is refused (filter="data")."""
    with atomic_files.replace_folder(root) as target, tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(target, filter="data")


def _as_driver_knows(root: Path, recipe: Recipe) -> None:
    """Write into the manifest the recipe as the driver has it: the worker's file names mean nothing here."""
    RunDir.at(root).update(recipe=resolved(recipe), recipe_digest=digest(recipe))
