"""A run that is asked to stop saves the step in hand, and ends as if it had never been stopped."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.common import atomic_files, console, signals
from fast_ft.generate import answers
from fast_ft.pipeline import train_phase
from tests.helpers.parts import RecipeFactory
from tests.helpers.patience import PATIENCE, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's here")

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def nohup_is_undone() -> Iterator[None]:
    """The suite may run under nohup, whose ignored SIGHUP fast_ft leaves ignored."""
    before = {kind: signal.getsignal(kind) for kind in STOPS}
    for kind in STOPS:
        signal.signal(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL)
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def stopping(kind: int, steps: int) -> type[console.Bar]:
    """Return a bar that sends this process a signal when it has come so far."""

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == steps:
                signal.raise_signal(kind)

    return Stopping


def adapter_digest(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["digests"]["adapter"]


def test_a_stopped_run_saves_its_step_and_goes_on_to_the_same_adapter(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # noise makes a lost seed show
    path = recipe_file({"train.neftune_noise_alpha": 5, "curriculum.stages": [], "train.num_train_epochs": 3})
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = ["train", str(path), f"output_dir={stopped}"]
    handlers = [signal.getsignal(kind) for kind in STOPS]
    for steps, kind in enumerate(STOPS, start=1):
        with monkeypatch.context() as patch:
            patch.setattr(train_phase, "Bar", stopping(kind, 3 * steps))
            assert main(command) == 130
        log = (stopped / "log.jsonl").read_text().splitlines()
        saved = json.loads((stopped / "checkpoints" / f"step-{3 * steps}" / "state.json").read_text())["progress"]
        assert len(log) == saved["global_step"] == 3 * steps
    assert [signal.getsignal(kind) for kind in STOPS] == handlers
    assert main(command) == 0
    assert main(["train", str(path), f"output_dir={whole}"]) == 0
    assert len((stopped / "log.jsonl").read_text().splitlines()) == 12
    assert adapter_digest(stopped) == adapter_digest(whole)


@pytest.mark.parametrize("kind", STOPS)
def test_answers_that_are_stopped_end_within_10_seconds_with_status_130_and_go_on(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    path = recipe_file({"generate.max_new_tokens": 5, "generate.batch_size": 2, "output_dir": str(tmp_path / "run")})
    handlers = [signal.getsignal(each) for each in STOPS]
    stopped: list[float] = []

    class Stopping(stopping(kind, 2)):  # type: ignore[misc]
        def advance(self, by: int = 1, facts: str = "") -> None:
            stopped[:] = stopped or [time.process_time()] * (self.done + by >= 2)
            super().advance(by, facts)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "Bar", Stopping)
        assert main([str(path)]) == 130
    assert time.process_time() - stopped[0] < 10, "of the processor's time, from the signal to the end"
    assert [signal.getsignal(each) for each in STOPS] == handlers
    partial = tmp_path / "run" / "pred.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 2 and not (tmp_path / "run" / "pred.json").exists()
    assert not (tmp_path / "run" / ".lease").exists()
    assert main([str(path)]) == 0
    assert len(json.loads((tmp_path / "run" / "pred.json").read_text())) == 5


@pytest.mark.parametrize("second", ["in the same step", "while the state is saved"])
def test_ctrl_c_twice_stops_at_once_and_loses_the_step_in_hand_at_most(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    path = recipe_file({"train.save_steps": 2, "output_dir": str(tmp_path / "run"), "data.test": None})

    class Impatient(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == 3:
                signal.raise_signal(signal.SIGINT)
                if second == "in the same step":
                    signal.raise_signal(signal.SIGINT)

    def before(what: str, file: Path) -> None:
        if what == "rename" and file.name == "step-3":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train_phase, "Bar", Impatient)
        patch.setattr(atomic_files, "before", before)
        assert main([str(path)]) == 130
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert main([str(path)]) == 0
    assert main([str(path), f"output_dir={tmp_path}/whole"]) == 0
    assert adapter_digest(tmp_path / "run") == adapter_digest(tmp_path / "whole")


# ---- whatever a command waits for, it ends


def ending(wait: Callable[[], None], errors: Path, grace: float) -> None:
    """In a process of its own: a command that waits for something."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    signals.GRACE = grace
    signals.end_in_time()
    try:
        wait()
    except KeyboardInterrupt:
        sys.exit(130)


def wait_in_a_thread() -> None:
    """As the hub's client does: leaving the block waits for the thread, and so does Python at its end."""
    with ThreadPoolExecutor() as pool:
        pool.submit(say_and_wait).result()


def wait_in_c() -> None:
    """In a call that no signal interrupts, as a name's look-up may be: a mutex that is locked already."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    os.write(2, b"waiting")
    library.pthread_mutex_lock(mutex)


def say_and_wait() -> None:
    os.write(2, b"waiting")
    threading.Event().wait()


@pytest.mark.parametrize("wait", [say_and_wait, wait_in_a_thread, wait_in_c])
@pytest.mark.parametrize(("kinds", "grace"), [([signal.SIGTERM], 0.1), ([signal.SIGINT, signal.SIGHUP], 2 * PATIENCE)])
def test_a_process_that_waits_ends_after_a_signal_and_at_once_after_two(
    tmp_path: Path, wait: Callable[[], None], kinds: list[int], grace: float
) -> None:
    errors = tmp_path / "errors"
    process = multiprocessing.get_context("fork").Process(target=ending, args=(wait, errors, grace))
    process.start()
    try:
        wait_until(lambda: errors.exists() and "waiting" in errors.read_text(), process.is_alive)
        for kind in kinds:
            os.kill(process.pid or 0, kind)
        process.join(PATIENCE)
        assert process.exitcode == 130
    finally:
        process.kill()


def finishing_a_step(errors: Path) -> None:
    """In a process of its own: training, whose step takes longer than a waiting command would be given."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    signals.GRACE = 0.0
    signals.end_in_time()
    asked = threading.Event()
    with signals.calling(asked.set):
        signal.raise_signal(signal.SIGTERM)
        assert asked.wait(PATIENCE)
        for _ in range(10):
            time.sleep(0.01)
    os._exit(7)


def test_the_step_in_hand_is_not_cut_short(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=finishing_a_step, args=(tmp_path / "errors",))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 7
