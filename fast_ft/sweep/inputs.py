"""Digests of what a sweep's trials read: trials that read different things cannot be compared with one another.

A run refuses to go on with other rows or another base (pipeline/resume.py). A sweep is many runs, and all of them have
to read what the first one read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.data import mixing, sources
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download, fingerprint
from fast_ft.recipe.loader import resolved
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir


def of_sweep(recipe: Recipe, validation: Path) -> dict[str, str]:
    """Return {name: digest} of what all trials share: validation rows, test prompts, the judge's reference answers."""
    found = {"the validation rows": atomic_files.sha256_file(validation)}
    if recipe.data.test:
        found[f"the test prompts {recipe.data.test}"] = sources.read(recipe.data.test, "test").digest
    if recipe.judge.references:
        found[f"the reference answers {recipe.judge.references}"] = sources.read(recipe.judge.references, "test").digest
    return found


def of_trial(recipe: Recipe) -> dict[str, str]:
    """Return {name: digest} of a trial's training rows, base model, and tokenizer with its chat template."""
    model = recipe.model
    at = f"@{model.revision}" if model.revision else ""
    base = download.model_folder(model.name_or_path, model.revision)
    tokens = download.tokenizer_folder(model.tokenizer or model.name_or_path, model.revision)
    weights = [f"{path.name} {fingerprint.weights_digest(path)}" for path in sorted(base.glob("*.safetensors"))]
    return {
        f"the training rows {recipe.data.train_name}": mixing.digest(recipe.data),
        f"the base model {model.name_or_path}{at}": _digest([*_files(base, download.CONFIG_FILES), *weights]),
        f"the tokenizer {model.tokenizer or model.name_or_path}{at}": _digest(_files(tokens, download.TOKENIZER_FILES)),
    }


def training_digest(recipe: Recipe, prepared: PreparedData) -> str:
    """Return the digest of what makes an adapter: base, rows and their order, adapter, training, seed.

    Validation rows make it only where the adapter of the least validation loss is kept.
    """
    tree = resolved(recipe)
    train = {key: value for key, value in tree["train"].items() if key not in ("report_to", "save_steps", "capture")}
    stages = [[stage.name, stage.order, stage.learning_rate, stage.num_train_epochs, [e.digest for e in stage.examples]]
              for stage in prepared.stages]  # fmt: skip
    folder = download.model_folder(recipe.model.name_or_path, recipe.model.revision)
    held_out = [example.digest for example in prepared.held_out] if recipe.train.load_best else []
    content = [
        tree["model"],
        str(folder),
        tree["lora"],
        train,
        tree["curriculum"]["carry"],
        recipe.seed,
        stages,
        held_out,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check_trained(folder: RunDir, prepared: PreparedData) -> None:
    """Raise InputError where a finished trial read other training rows than the driver: the file changed meanwhile."""
    if folder.manifest()["digests"].get("train") != prepared.digests["train"]:
        raise InputError(
            f"{folder.root}: its worker read other training rows than the trials before it. Put back what was there, "
            "delete this folder, and give the same command again; or begin a new sweep with --output."
        )


def _files(folder: Path, names: Iterable[str]) -> list[str]:
    return [f"{name} {atomic_files.sha256_file(folder / name)}" for name in names if (folder / name).is_file()]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
