"""A run that is asked to stop saves the step in hand, and ends as if it had never been stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's here")


def adapter_digest(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["digests"]["adapter"]


def test_a_stopped_run_saves_its_step_and_goes_on_to_the_same_adapter(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    # 40 steps of training, so that the signal comes in the middle of them; noise makes a lost seed show
    recipe = recipe_file({"train.neftune_noise_alpha": 5, "curriculum.stages": [], "train.num_train_epochs": 10})
    command = [sys.executable, "-m", "fast_ft", "train", str(recipe)]
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [*command, f"output_dir={stopped}"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    log = stopped / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, "training never began"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    steps = log.read_text().count("\n")
    saved = json.loads((stopped / "stages" / "01-all" / "state.json").read_text())["progress"]
    assert 3 <= steps < 40 and saved["global_step"] == steps
    whole = tmp_path / "whole"
    for folder in (stopped, whole):
        subprocess.run([*command, f"output_dir={folder}"], cwd=ROOT, check=True, capture_output=True)
    assert adapter_digest(stopped) == adapter_digest(whole)
