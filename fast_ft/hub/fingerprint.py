"""The fingerprint of a base model: it tells later whether a run goes on with the same one.

A 7B's weights are 4 to 13 GB. Reading them whole would take longer than the rest of the record, so they are known by
their names in the hub's cache, which are their digests, or by a digest over samples of the file.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from fast_ft.common import untrusted_files
from fast_ft.hub import download, families

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 18


def model(name_or_path: str, revision: str | None) -> dict[str, Any]:
    """Return {name_or_path, revision, commit, config, weights}, ready for JSON.

    commit is the hub's, None for a folder. config is config.json's content; weights {file name: digest}.
    """
    folder = download.model_folder(name_or_path, revision)
    return {
        "name_or_path": name_or_path,
        "revision": revision,
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "config": families.read_config(folder),
        "weights": {path.name: weights_digest(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def weights_digest(path: Path) -> str:
    """Return "sha256:..." where the hub's cache names the file by its digest, else "samples:...".

    "samples" is over the file's size and 64 samples of 256 KiB: other weights of the same shape give another digest,
    but one changed number may not.
    """
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return f"sha256:{blob}"
    return f"samples:{_sampled(path, untrusted_files.state_of(path))}"


@functools.lru_cache(maxsize=64)
def _sampled(path: Path, state: tuple[int, ...]) -> str:
    """Return the digest of a file's samples, read once a process for each state of it: a sweep asks at each trial."""
    size = state[0]
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()
