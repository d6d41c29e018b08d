"""`make newest`: which versions are newest, whether they resolve together, and whether a run works with them on a CPU.

A report that never fails: newer versions than the pinned ones are news and no fault. What is not known after SECONDS
is said to be so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: torch as Colab's image had it in August 2026; its release notes tell when that changes.
COLABS_TORCH = "torch==2.11.0"
SECONDS = 270.0  #: for the whole report
FEW_STEPS = ("train.max_steps=2", "train.warmup_steps=1", "generate.max_new_tokens=4", "judge.kind=none",
             "judge.references=null", "judge.base_prompts=0")  # fmt: skip


class Late(Exception):
    """A command took longer than it may."""


def run(command: Sequence[str | Path], until: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command until a moment (time.monotonic). Raises Late; then it has ended with all that it started."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Late from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def resolves(until: float, *wanted: str) -> str:
    """Return which versions pip would take for `wanted`, or the last line of why it takes none. Raises Late."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = run([*command, *wanted], until)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        return f"does not resolve: {said[-1]}"
    found = {
        each["metadata"]["name"].lower(): each["metadata"]["version"] for each in json.loads(done.stdout)["install"]
    }
    names = ("unsloth", "unsloth_zoo", "trl", "torch", "transformers", "peft", "datasets")
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def quickstart_with(until: float, *newest: str) -> str:
    """Return how a short quickstart ends where `newest`, without what they depend on, stand over what is installed.

    Raises Late.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        packages = Path(sysconfig.get_path("purelib", vars={"base": folder}))
        (packages / "installed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        python = Path(folder) / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--upgrade"]
        done = run([*pip, *newest], until)
        if done.returncode == 0:
            command = [str(python), "-m", "fast_ft", "recipes/quickstart.yaml", *FEW_STEPS, f"output_dir={folder}/run"]
            done = run(command, until, ROOT)
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing said"]
        version = next(iter(packages.glob(f"{newest[0]}-*.dist-info")), Path("of no version")).name.removesuffix(
            ".dist-info"
        )
        return f"{version} works" if done.returncode == 0 else f"{version}: status {done.returncode}: {said[-1]}"


def main() -> None:
    """Print the report."""
    until = time.monotonic() + SECONDS
    # pip fetches whole wheels where an index does not serve their metadata alone: minutes.
    for question, answer in {
        "a short quickstart with the newest TRL": lambda: quickstart_with(until, "trl"),
        "newest Unsloth with the newest TRL": lambda: resolves(until, "unsloth", "trl"),
        "newest Unsloth with Colab's torch": lambda: resolves(until, "unsloth", COLABS_TORCH),
    }.items():
        try:
            print(f"{question}: {answer()}", flush=True)
        except Late:
            print(f"{question}: not known; the report has {SECONDS:.0f} s", flush=True)


if __name__ == "__main__":
    main()
