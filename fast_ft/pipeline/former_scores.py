"""Scores of former answers, which are kept beside the new ones."""

from __future__ import annotations

from fast_ft.common import atomic_files
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir


def set_scores_aside(folder: RunDir) -> str | None:
    """Keep scores.json beside, under the digest of the pred.json that it scores; return its new name, or None.

    Scores of the same answers by several judges are told apart by their own digest.
    """
    folder.reopen("judge")
    if not folder.scores.is_file():
        return None
    of, own = scored_pred(folder), atomic_files.sha256_file(folder.scores)[:8]
    name = of[:8] if of else f"unreadable-{own}"
    beside = folder.root / f"{folder.scores.stem}-{name}.json"
    if beside.is_file() and atomic_files.sha256_file(beside)[:8] != own:
        beside = folder.root / f"{folder.scores.stem}-{name}-{own}.json"
    atomic_files.move(folder.scores, beside)
    return beside.name


def scored_pred(folder: RunDir) -> str | None:
    """Return the digest of the pred.json that scores.json is of, or None where that cannot be told."""
    try:
        return artifacts.read_scores(folder.scores).pred
    except InputError as error:
        note(f"warning: {error}")
        return None
