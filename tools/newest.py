"""`make newest`: which versions are newest, whether they resolve together, and whether a run works with them on a CPU.

A report that never fails: newer versions than the pinned ones are news and no fault.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: torch as Colab's image had it in August 2026; its release notes tell when that changes.
COLABS_TORCH = "torch==2.11.0"
FEW_STEPS = ("train.max_steps=2", "train.warmup_steps=1", "generate.max_new_tokens=4", "judge.kind=none",
             "judge.references=null", "judge.base_prompts=0")  # fmt: skip


def resolves(*wanted: str) -> str:
    """Return which versions pip would take for `wanted`, or the last line of why it takes none."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        return f"does not resolve: {said[-1]}"
    found = {
        each["metadata"]["name"].lower(): each["metadata"]["version"] for each in json.loads(done.stdout)["install"]
    }
    names = ("unsloth", "unsloth_zoo", "trl", "torch", "transformers", "peft", "datasets")
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def quickstart_with(*newest: str) -> str:
    """Return how a short quickstart ends where `newest`, without what they depend on, stand over what is installed."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        packages = Path(sysconfig.get_path("purelib", vars={"base": folder}))
        (packages / "installed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        python = Path(folder) / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run([*pip, *newest], capture_output=True, text=True)
        if done.returncode == 0:
            command = [python, "-m", "fast_ft", "recipes/quickstart.yaml", *FEW_STEPS, f"output_dir={folder}/run"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing said"]
        version = next(iter(packages.glob(f"{newest[0]}-*.dist-info")), Path("of no version")).name.removesuffix(
            ".dist-info"
        )
        return f"{version} works" if done.returncode == 0 else f"{version}: status {done.returncode}: {said[-1]}"


def main() -> None:
    """Print the report."""
    print("a short quickstart with the newest TRL:", quickstart_with("trl"), flush=True)
    # pip fetches whole wheels where an index does not serve their metadata alone: minutes.
    print("newest Unsloth with the newest TRL:", resolves("unsloth", "trl"), flush=True)
    print("newest Unsloth with Colab's torch:", resolves("unsloth", COLABS_TORCH), flush=True)


if __name__ == "__main__":
    main()
