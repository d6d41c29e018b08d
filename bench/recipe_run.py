"""One recipe through each backend, from command to pred.json, each in a process of its own; then crosswise loading."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from fast_ft.common.errors import InputError
from fast_ft.recipe import loader
from fast_ft.run.folder import RunDir, output_folder

BACKENDS = ("fused", "unsloth", "peft")


def measure(recipe_path: str, overrides: Sequence[str], backend: str, log: Path) -> dict[str, Any]:
    """Run the recipe through one backend and return what was measured, with the environment.

    The wall time is from the command's start to its end. InputError where the run fails; `log` keeps its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    folder, run = run_command(recipe_path, [*overrides, f"model.backend={backend}"], log)
    return {
        **machine.stamp(shlex.join(["python", "-m", "bench", recipe_path, *overrides, "--backends", backend])),
        "backend": backend,
        **run,
        "adapter_in_plain_peft_nats": _check_with_peft(folder),
        "pred_ids": len(json.loads((folder / "pred.json").read_text(encoding="utf-8"))),
    }


def run_command(
    recipe_path: str, overrides: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Run `python -m fast_ft RECIPE` in a process of its own; return its folder, and what was measured and recorded.

    `environment` is added to this process's. InputError where the run is there already, or fails.
    """
    recipe = loader.load_recipe(recipe_path, overrides)
    folder = output_folder(recipe, recipe_path)
    if (folder / "manifest.json").exists():
        raise InputError(f"{folder}: this run is there already, and would not be measured. Move or delete it first.")
    began, started = time.time(), time.monotonic()
    start("fast_ft", [recipe_path, *overrides], log, environment or {})
    seconds = time.monotonic() - started
    run = RunDir.at(folder)
    manifest = run.manifest()
    lines = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return folder, {
        "wall_seconds": round(seconds, 2),
        "pred_seconds": round(run.pred.stat().st_mtime - began, 2),
        "train": manifest["phases"]["train"],
        "generate": manifest["phases"]["generate"],
        "rows": len(manifest["rows"]),
        "plan": json.loads(run.plan.read_text(encoding="utf-8")),
        "notes": manifest.get("notes", []),
        "out_of_memory": [line for line in said if "out of memory" in line.lower()],
        "digests": manifest["digests"],
        "steps": [{key: line[key] for key in ("stage", "loss", "grad_norm", "tokens", "seconds")} for line in lines],
    }


def start(module: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run a module in a process of its own, its output in `log`; InputError, with the log's end, where it fails."""
    with log.open("wb") as file:
        command, env = [sys.executable, "-m", module, *words], {**os.environ, **environment}
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if status:
        lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise InputError(f"python -m {module} ended with status {status}; {log} ends with:\n{lines}")


def _check_with_peft(folder: Path) -> float:
    """Load a run's adapter with plain transformers and PEFT, in a process without Unsloth; return the difference."""
    code = (
        "import sys; from fast_ft.models.loaders import choose; from fast_ft.models import adapter_check; "
        "from fast_ft.run.folder import RunDir; "
        "from fast_ft.data.encoding import load_encoder; r = RunDir.at(sys.argv[1]); p = r.recipe(); "
        "b = choose.make_loader(p.model, p.lora, seed=p.seed, name='peft'); "
        "print(adapter_check.verify(r.adapter, b.for_generation(r.adapter), load_encoder(p.model).pad_id))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    if answer.returncode:
        raise InputError(f"plain PEFT does not load the adapter of {folder}:\n{answer.stderr[-2000:]}")
    return round(float(answer.stdout.split()[-1]), 6)
