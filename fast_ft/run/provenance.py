"""What describes the program and the machine of a run: package versions, GPU, and a digest of the program's files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from fast_ft.common import gpu

PACKAGE = Path(__file__).parents[1]
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers",
    "datasets", "tokenizers", "sentencepiece", "safetensors", "pyarrow",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Return versions (null where a package is absent), system and GPU. Imports none of the packages."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "gpu": gpu.gpu(),
        "program": source_digest(),
    }


def source_files() -> list[Path]:
    """Return the package's own program files, in order of name: Python, the cards' table, the report's page."""
    found = [*PACKAGE.rglob("*.py"), PACKAGE / "plan" / "cards.json", *(PACKAGE / "report" / "static").glob("*")]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def source_digest() -> str:
    """Return the sha256 (hex) over names and contents of the package's program files."""
    total = hashlib.sha256()
    for path in source_files():
        total.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()
