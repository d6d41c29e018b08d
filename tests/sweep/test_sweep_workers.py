"""Workers of a sweep: processes that are killed, a driver that is killed, a Ray cluster on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fast_ft.recipe.loader import load_recipe
from fast_ft.sweep import workers
from fast_ft.sweep.ray_workers import RayActor, RayWorkers
from fast_ft.sweep.sweep import Sweep
from fast_ft.sweep.trial_runner import TrialRunner
from fast_ft.sweep.trial_task import TrialResult, TrialTask
from fast_ft.sweep.workers import LocalWorkers
from tests.helpers.parts import ROOT, write_recipe
from tests.helpers.patience import PATIENCE

SEARCH = {
    "sampler": "grid", "objective": "chrf", "prompts": 10, "pruner": "none",
    "space": {"train.learning_rate": [0.01, 0.02], "generate.max_new_tokens": [6, 9]},
}  # fmt: skip
CHANGES = {
    "select.take": 8, "curriculum.stages": [], "train.num_train_epochs": 4, "judge.kind": "none", "search": SEARCH,
}  # fmt: skip
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def recipe(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny, train_file, test_file, CHANGES)


@pytest.fixture(scope="module")
def values(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the grid gives with two processes, one of which dies in the middle of its first trial."""
    root = tmp_path_factory.mktemp("local") / "sweep"
    sweep = Sweep(load_recipe(recipe), recipe, hours=None, output=root)

    class Unlucky(LocalWorkers):
        killed = 0

        def submit(self, worker: int, task: TrialTask) -> None:
            super().submit(worker, task)
            if not self.killed:
                self.killed = self._workers[worker].process.pid or 0
                os.kill(self.killed, signal.SIGKILL)

    pool = Unlucky(2, root / "logs", TrialRunner)
    pids = {worker.process.pid for worker in pool._workers}
    sweep.run(lambda logs: pool)
    assert pool.killed in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 0, 0)  # none is left behind
    found = scores(root)
    assert len(found) == 4
    return found


def scores(root: Path) -> dict[str, float]:
    trials = json.loads((root / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert all(trial["state"] == "finished" for trial in trials)
    return {json.dumps(trial["point"]): trial["value"] for trial in trials}


@pytest.mark.soak
def test_a_killed_worker_loses_nothing(values: dict[str, float]) -> None:
    assert len(values) == 4


@pytest.mark.soak
def test_a_killed_sweep_goes_on_without_losing_a_finished_trial(
    recipe: Path, values: dict[str, float], tmp_path: Path
) -> None:
    root = tmp_path / "sweep"
    words = [sys.executable, "-m", "fast_ft", "sweep", str(recipe), "--output", str(root), "--workers", "1"]
    journal = root / "study.journal"

    def finished() -> int:
        return journal.read_text(encoding="utf-8").count('"finished"') if journal.is_file() else 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 400
    while finished() < 1 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line for line in journal.read_bytes().splitlines() if b'"finished"' in line]
    assert before
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"half a li')  # as a kill in the middle of a write leaves it
    done = subprocess.run([*words, "--resume"], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr, "the workers were let go of, not killed"
    after = journal.read_bytes()
    assert all(line in after for line in before) and scores(root) == pytest.approx(values)
    trials = json.loads((root / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert len({trial["folder"] for trial in trials}) == 4  # a trial in flight was done in the folder that it had


def test_resume_without_a_sweep_is_an_error(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fast_ft.cli.main import main

    assert main(["sweep", str(recipe), "--resume", "--output", str(tmp_path / "none")]) == 2
    assert "no sweep of this recipe was begun" in capsys.readouterr().err


def test_an_interrupted_worker_stops_soon_and_lives_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "GRACE", PATIENCE)
    base = load_recipe(recipe)
    pool = LocalWorkers(1, tmp_path / "logs", TrialRunner)
    pid = pool._workers[0].process.pid

    def task(name: str, epochs: int) -> TrialTask:
        train = base.train.model_copy(update={"num_train_epochs": epochs, "warmup_steps": 1})
        data = base.data.model_copy(update={"test": None})
        changed = {"output_dir": str(tmp_path / name), "train": train, "data": data}
        return TrialTask(base.model_copy(update=changed), "small.yaml")

    try:
        pool.submit(0, task("long", 100_000))
        log = tmp_path / "long" / "log.jsonl"
        while not log.is_file() or not log.stat().st_size:
            assert not pool.wait(0.2), (tmp_path / "logs" / "worker-0.log").read_text()
        pool.interrupt()
        assert pool.idle() == [0] and pool._workers[0].process.pid == pid
        pool.submit(0, task("short", 1))
        found: list[tuple[int, TrialResult | None]] = []
        while not found:
            found = pool.wait(1.0)
        assert found[0][1] is not None and found[0][1].problem is None
        assert (tmp_path / "short" / "adapter").is_dir()
        broken: Any = None
        pool.submit(0, TrialTask(broken, "small.yaml"))
        ((_, result),) = pool.wait(PATIENCE)
        assert result is not None and str(result.problem).startswith("a bug: ") and "Traceback" in result.traceback
        pool.submit(0, task("after", 1))
        assert pool.wait(PATIENCE) == [(0, None)], "a worker with a bug ends, and another is there"
        assert pool._workers[0].process.pid != pid
    finally:
        pool.close()


def test_each_worker_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    started: list[dict[str, str]] = []
    monkeypatch.setattr(LocalWorkers, "_spawn", lambda self, number: started.append(self._variables(number)))
    LocalWorkers(2, tmp_path, TrialRunner)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in started] == ["2", "GPU-5"]


def test_a_bug_in_a_ray_worker_keeps_its_traceback(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a task, and around it; Ray itself need not be installed for either."""

    def broken(self: TrialRunner, task: TrialTask, times: Any) -> int:
        raise ZeroDivisionError("boom")

    monkeypatch.chdir(tmp_path)  # a seat goes to its driver's folder
    monkeypatch.setattr(TrialRunner, "_run", broken)
    result, packed, _ = RayActor(str(tmp_path), TrialRunner).run(
        TrialTask(load_recipe(recipe), "small.yaml"), {"test": b""}
    )
    assert result.problem == "a bug: ZeroDivisionError: boom" and "in broken" in result.traceback and not packed

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        pass

    def get(reference: str) -> Any:
        raise RayTaskError("Traceback: in unpack") if reference == "bug" else RayError("the host is gone")

    ours: Any = RayWorkers.__new__(RayWorkers)
    ours._ray = SimpleNamespace(
        wait=lambda tasks, **_: (tasks, []), get=get,
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
    )  # fmt: skip
    replaced: list[int] = []
    ours._replace, ours._tasks = replaced.append, {"bug": (0, None), "lost": (1, None)}
    (_, bug), (_, lost) = ours.wait(1.0)
    assert bug == TrialResult(problem="a bug in a Ray worker", traceback="Traceback: in unpack")
    assert lost is None and replaced == [1], "what is lost is tried again elsewhere, a bug is not"


@needs_ray
@pytest.mark.soak
def test_two_ray_workers_give_the_same_scores_though_one_is_killed(
    recipe: Path, values: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    submitted: list[int] = []
    submit = RayWorkers.submit

    def and_kill_the_second(self: RayWorkers, worker: int, task: TrialTask) -> None:
        submit(self, worker, task)
        submitted.append(worker)
        if len(submitted) == 2:
            self._ray.kill(self._actors[worker])

    monkeypatch.setattr(RayWorkers, "submit", and_kill_the_second)
    root = tmp_path / "sweep"
    sweep = Sweep(load_recipe(recipe), recipe, hours=None, output=root)
    sweep.run(lambda logs: RayWorkers("local", 2, TrialRunner))
    assert not ray.is_initialized() and set(submitted) == {0, 1}
    assert scores(root) == pytest.approx(values)
    trials: list[dict[str, Any]] = json.loads((root / "sweep.json").read_text(encoding="utf-8"))["trials"]
    for trial in trials:
        folder = Path(trial["folder"])
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["recipe"]["data"]["test"] == str(root / "validation.json")
        assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "log.jsonl").is_file()


def test_ray_is_not_imported_without_the_flag() -> None:
    code = "import sys, fast_ft.sweep.sweep, fast_ft.sweep.workers; print('ray' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
