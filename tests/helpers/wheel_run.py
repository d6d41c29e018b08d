"""For `make wheel-test`: run the quickstart by an installed wheel's command, outside of the repository.

python -m tests.helpers.wheel_run BIN FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

#: A few steps and short answers: whether all is there, not how well it learns.
FEW = ("train.max_steps=2", "train.warmup_steps=1", "generate.max_new_tokens=4", "judge.base_prompts=5")


def main() -> None:
    """Run the quickstart in FOLDER by BIN/fast-ft, and check what it wrote."""
    bin_, folder = map(Path, sys.argv[1:])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command: list[str | os.PathLike[str]] = [bin_.resolve() / "fast-ft", "quickstart", *FEW]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    assert run.name in done.stderr, done.stderr
    answers = json.loads((run / "pred.json").read_text(encoding="utf-8"))
    assert len(answers) == 100, len(answers)
    model = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["recipe"]["model"]["name_or_path"]
    assert model == "fast_ft/pocket/base", f"{model}: the run is the same wherever it is installed"
    print(f"the wheel's quickstart wrote {len(answers)} answers")


if __name__ == "__main__":
    main()
