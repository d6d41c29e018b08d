"""What describes the program and the machine of a run: package versions, GPU, and a digest of the program's files."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from fast_ft.common import gpu

PACKAGE = Path(__file__).parents[1]
#: Rooms and files that no run of a recipe executes: a zip that is handed in leaves them out.
ELSEWHERE = (
    "doctor/", "export/", "pocket/", "recipes/", "sweep/", "cli/new_recipe.py", "report/explorer.py",
    "report/server.py", "report/watch.py", "report/static/ask.js", "report/static/explore.js", "report/static/watch.js",
)  # fmt: skip
_NO_PROGRAM = (".md", ".safetensors", ".gguf", ".pyc")
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers",
    "datasets", "tokenizers", "sentencepiece", "safetensors", "pyarrow",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Return versions (null where a package is absent), system and GPU. Imports none of the packages."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": gpu.gpu(),
        "program": source_digest(),
    }


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_files() -> list[Path]:
    """Return the program files that a run may execute, in order of name: Python, kernels, the cards' table, the page.

    The pocket's rows and base model are no program, and what is in ELSEWHERE is done before or after a run.
    """
    names = ((path, path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(
        path
        for path, name in names
        if path.suffix not in _NO_PROGRAM and "__pycache__" not in path.parts and not name.startswith(ELSEWHERE)
    )


@functools.cache
def source_digest() -> str:
    """Return the sha256 (hex) over names and contents of the package's program files, as they were when first asked."""
    total = hashlib.sha256()
    for path in source_files():
        total.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()
