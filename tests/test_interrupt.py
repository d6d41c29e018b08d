"""A run that is asked to stop saves the step in hand, and ends as if it had never been stopped."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RecipeFactory

from fast_ft import atomic, generate, progress, train_phase
from fast_ft.__main__ import main

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


def stopping(kind: int, steps: int) -> type[progress.Bar]:
    """Return a bar that sends this process a signal when it has come so far."""

    class Stopping(progress.Bar):
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
    with monkeypatch.context() as patch:
        patch.setattr(generate, "Bar", stopping(kind, 2))
        assert main([str(path)]) == 130
    ended = time.time()
    assert [signal.getsignal(each) for each in STOPS] == handlers
    partial = tmp_path / "run" / "pred.partial.jsonl"
    assert ended - partial.stat().st_mtime < 10, "from the last answer, at which the signal came, to the end"
    assert len(partial.read_text().splitlines()) == 2 and not (tmp_path / "run" / "pred.json").exists()
    assert not (tmp_path / "run" / ".lease").exists()
    assert main([str(path)]) == 0
    assert len(json.loads((tmp_path / "run" / "pred.json").read_text())) == 5


@pytest.mark.parametrize("second", ["in the same step", "while the state is saved"])
def test_ctrl_c_twice_stops_at_once_and_loses_the_step_in_hand_at_most(
    recipe_file: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    path = recipe_file({"train.save_steps": 2, "output_dir": str(tmp_path / "run"), "data.test": None})

    class Impatient(progress.Bar):
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
        patch.setattr(atomic, "before", before)
        assert main([str(path)]) == 130
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert main([str(path)]) == 0
    assert main([str(path), f"output_dir={tmp_path}/whole"]) == 0
    assert adapter_digest(tmp_path / "run") == adapter_digest(tmp_path / "whole")
