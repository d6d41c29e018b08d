"""A trial's run folder, beyond what any run has: whether it is trained, and answers at the end of a stage."""

from __future__ import annotations

import shutil
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.run.folder import RunDir


def stage_answers(folder: RunDir, step: int) -> Path:
    """Return the path of the answers of a trial that stands at `step`."""
    return folder.root / "stage-answers" / str(step) / "pred.json"


def is_trained(folder: Path) -> bool:
    """Return whether a run folder, which a user may have tidied up, still holds its adapter."""
    return (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "manifest.json").is_file()


def adopt(folder: RunDir, other: RunDir) -> None:
    """Take another run's training as this one's: adapter, log and facts. The other run's recipe trains the same."""
    with atomic_files.replace_folder(folder.adapter) as target:
        shutil.copytree(other.adapter, target, dirs_exist_ok=True)
    for name in ("log.jsonl", "loss.png"):
        if (other.root / name).is_file():
            atomic_files.write_bytes(folder.root / name, (other.root / name).read_bytes())
    theirs = other.manifest()
    adapter = {"adapter": theirs["digests"]["adapter"]}
    folder.update(model=theirs.get("model"), digests=folder.manifest()["digests"] | adapter)
    facts = {key: value for key, value in theirs["phases"]["train"].items() if key not in ("seconds", "finished")}
    folder.finish("train", 0.0, **facts | {"training_seconds": 0.0, "trained_in": str(other.root)})
