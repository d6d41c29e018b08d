"""A small whole run by the run's own code: the pocket base, two training steps, two short greedy answers.

python -m fast_ft.doctor.smoke_run prints one line of JSON. It is a process of its own: a broken driver may end it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

POCKET = Path(__file__).parents[1] / "pocket"
ROWS, PROMPTS, TOKENS = 8, 2, 8


def trial() -> dict[str, Any]:
    """Run it on this machine's device, and return what its manifest says of it."""
    from fast_ft.pipeline.run import run
    from fast_ft.recipe.loader import validated

    with tempfile.TemporaryDirectory(prefix="fast_ft-") as name:
        folder = Path(name)
        for kind, count in (("train", ROWS), ("test", PROMPTS)):
            rows = json.loads((POCKET / f"{kind}.json").read_text(encoding="utf-8"))[:count]
            (folder / f"{kind}.json").write_text(json.dumps(rows), encoding="utf-8")
        tree = {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(POCKET / "base"), "max_length": 256},
            "data": {"train": str(folder / "train.json"), "test": str(folder / "test.json")},
            "train": {"effective_batch_size": ROWS // 2, "warmup_steps": 0},
            "generate": {"do_sample": False, "max_new_tokens": TOKENS},
        }
        manifest = run(validated(tree, {}, "the self-test's recipe"), "self-test.yaml").manifest()
    train, generate = manifest["phases"]["train"], manifest["phases"]["generate"]
    return {
        "backend": train["backend"],
        "dtype": train["dtype"],
        "steps": train["steps"],
        "train_seconds": train["training_seconds"],
        "tokens": generate["new_tokens"],
        "decode_seconds": generate["decoding_seconds"],
        "losses": [train["first_loss"], train["last_loss"]],
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = trial()
    print(json.dumps(result))
