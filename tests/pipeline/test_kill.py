"""SIGKILL at any moment, then the same command: adapter, answers, scores and log as if nothing had happened.

A moment is a place in the run (its manifest is there, its third step is logged, ...) and a share of the time that the
undisturbed run took from there to the next place. So the moments spread over all phases, on a slow machine too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files
from tests.helpers.killed import run, start, start_function
from tests.helpers.parts import POCKET, ROOT, answered, write_recipe
from tests.helpers.patience import PATIENCE


def lines(name: str, count: int) -> Callable[[Path], bool]:
    return lambda root: (root / name).is_file() and (root / name).read_bytes().count(b"\n") >= count


def there(name: str) -> Callable[[Path], bool]:
    return lambda root: (root / name).exists()


#: The places of a run, in order.
PLACES: list[tuple[str, Callable[[Path], bool]]] = [
    ("start", lambda root: True),
    ("a folder", there("manifest.json")),
    ("the first step", lines("log.jsonl", 1)),
    ("a checkpoint", there("checkpoints/step-4/state.json")),
    ("the second stage", lines("log.jsonl", 7)),
    ("an adapter", there("adapter/adapter_model.safetensors")),
    ("three answers", lines("pred.partial.jsonl", 3)),
    ("all answers", there("pred.json")),
]


def run_and_note(root: str, words: list[str], errors: str, notes: str) -> None:
    """In the child: the run, and after how many seconds it came to each place and to its end."""
    began, at = time.monotonic(), list[float]()

    def before(what: str, path: Path) -> None:
        while len(at) < len(PLACES) and PLACES[len(at)][1](Path(root)):
            at.append(time.monotonic() - began)

    atomic_files.before = before
    try:
        run(words, errors, {})
    finally:
        Path(notes).write_text(json.dumps([*at, time.monotonic() - began]))


def run_and_die(root: str, words: list[str], errors: str, place: int, seconds: float) -> None:
    """In the child: the run, killed these seconds after it came to a place, and no later than at the next one.

    The process kills itself, so that the moment hangs on no other process's turn. On a machine that is faster by now
    the next place comes first.
    """
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True  # a run that ends before has not been killed
    armed = False

    def before(what: str, path: Path) -> None:
        nonlocal armed
        if armed and place + 1 < len(PLACES) and PLACES[place + 1][1](Path(root)):
            os.kill(os.getpid(), signal.SIGKILL)
        if not armed and PLACES[place][1](Path(root)):
            armed = True
            timer.start()

    before("", Path(root))
    atomic_files.before = before
    run(words, errors, {})


def outcome(root: Path) -> dict[str, Any]:
    """What must not depend on whether a run was killed."""
    manifest = json.loads((root / "manifest.json").read_text())
    log = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return {
        "adapter": atomic_files.sha256_file(root / "adapter" / "adapter_model.safetensors"),
        "pred": (root / "pred.json").read_bytes(),
        "base": (root / "base_pred.json").read_bytes(),
        "scores": json.loads((root / "scores.json").read_text())["mean"],
        "selection": (manifest["rows"], manifest["stages"], manifest["digests"]),
        "steps": [(line["step"], line["loss"], line["learning_rate"]) for line in log],
        "files": sorted(str(path.relative_to(root)) for path in root.rglob("*")),
    }


class Killing:
    """A recipe, how its undisturbed run went, and when that came to each place."""

    def __init__(self, folder: Path, recipe: Path, *overrides: str) -> None:
        self.folder, self.command, self.count = folder, [str(recipe), *overrides], 0
        start(["schema"], folder / "errors").join()  # the server imports the libraries before its first
        notes = folder / "notes.json"
        process = self.start(run_and_note, folder / "whole", str(notes))
        process.join()
        assert process.exitcode == 0, (folder / "errors").read_text()
        self.at = json.loads(notes.read_text())
        assert len(self.at) == len(PLACES) + 1
        self.wanted = outcome(folder / "whole")

    def start(self, how: Callable[..., None], root: Path, *more: Any) -> BaseProcess:
        words = [*self.command, f"output_dir={root}"]
        return start_function(how, str(root), words, str(self.folder / "errors"), *more)

    def whole(self, root: Path) -> None:
        process = start([*self.command, f"output_dir={root}"], self.folder / "errors")
        process.join(PATIENCE)
        assert process.exitcode == 0, (self.folder / "errors").read_text()[-3000:]

    def kill(self, *moments: tuple[int, float]) -> int:
        """Kill a run at each (place, share of the way to the next), start it again, and compare what it ends with.

        Returns how many kills came in time.
        """
        self.count += 1
        root, in_time = self.folder / f"killed-{self.count}", 0
        for place, share in moments:
            seconds = share * (self.at[place + 1] - self.at[place])
            process = self.start(run_and_die, root, place, seconds)
            process.join()
            in_time += process.exitcode == -signal.SIGKILL
        self.whole(root)
        assert outcome(root) == self.wanted, [(PLACES[place][0], f"{share:.0%}") for place, share in moments]
        return in_time

    def kill_once(self, place: int, share: float) -> bool:
        """kill() at one moment; where that came too late, on a machine that is faster now, at an earlier one."""
        return any(self.kill((place, share / 2**halvings)) for halvings in range(6))


def small(folder: Path, base: Path, rows: Path, prompts: Path, changes: dict[str, Any]) -> Killing:
    references = folder / "references.json"
    references.write_text(answered(prompts, "The hat is red."))
    values: dict[str, Any] = {
        "train.save_steps": 2, "train.neftune_noise_alpha": 5, "lora.lora_dropout": 0.1, "train.optim": "adamw_8bit",
        "curriculum.stages": [
            {"name": "easy", "upto": 0.5, "num_train_epochs": 3}, {"name": "all", "upto": 1.0, "num_train_epochs": 1},
        ],
        "generate.do_sample": True, "judge.kind": "reference", "judge.references": str(references),
        "judge.base_prompts": 2,
    }  # fmt: skip
    return Killing(folder, write_recipe(folder, base, rows, prompts, values | changes))


def test_a_run_killed_at_8_moments_ends_byte_for_byte_like_one_that_was_not(
    tiny: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    killing = small(tmp_path, tiny, train_file, test_file, {})
    rng = random.Random(7)
    moments = [(place, rng.random()) for place in range(len(PLACES))]
    assert killing.kill(*moments[::2]) + killing.kill(*moments[1::2]) >= 4


@pytest.mark.soak
def test_a_run_killed_at_40_moments_ends_byte_for_byte_like_one_that_was_not(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(json.loads((POCKET.parent / "test.json").read_text())[:20]))
    changes = {
        "model.template": "llama-2", "generate.max_new_tokens": 24, "train.num_train_epochs": 2,
        "train.learning_rate": 0.002, "judge.references": str(POCKET.parent / "references.json"),
    }  # fmt: skip
    killing = small(tmp_path, POCKET, POCKET.parent / "train.json", prompts, changes)
    rng = random.Random(40)
    assert all(killing.kill_once(place, rng.random()) for _ in range(5) for place in range(len(PLACES)))


@pytest.mark.soak
def test_the_quickstart_killed_10_times_ends_like_one_that_was_not(tmp_path: Path) -> None:
    killing = Killing(tmp_path, ROOT / "recipes" / "quickstart.yaml", "train.save_steps=4", "budget.train_minutes=null")
    rng = random.Random(10)
    assert all(killing.kill_once(place % len(PLACES), rng.random()) for place in range(10))
