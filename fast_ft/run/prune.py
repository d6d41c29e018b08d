"""Deleting runs that came to nothing: training failed, or has not ended and nobody is at it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.common.untrusted_files import refuse_links
from fast_ft.run import lock
from fast_ft.run.listing import ListedRun, ended_as
from fast_ft.run.manifest import read_manifest

_ENDED_BADLY = ("failed", "unfinished")
SUBMISSIONS = "submissions.json"  #: of a run whose answers were handed in (homework/public_scores.py)
SWEEP = "sweep.json"  #: in a sweep's folder, to whose trials the sweep goes back


def candidates(runs: Sequence[ListedRun], root: Path) -> tuple[list[ListedRun], list[str]]:
    """Return (the runs that may be deleted, a sentence for each other one that failed or is unfinished)."""
    chosen, kept = [], []
    for run in runs:
        if run.state in _ENDED_BADLY:
            reason = _reason_to_keep(run, root)
            if reason is None:
                chosen.append(run)
            else:
                kept.append(f"{run.folder} stays: {reason}")
    return chosen, kept


def delete(run: ListedRun) -> None:
    """Delete a run's folder, held as its own run would hold it. Raises InputError where it is in use, or refused.

    The folder gets another name first, so that no run goes on in what is half deleted. The manifest goes last: what a
    stop leaves behind is listed as an unfinished run, and can be deleted in the same way.
    """
    with lock.hold(run.folder), atomic_files.refusal(run.folder):
        if ended_as(read_manifest(run.folder / "manifest.json")[1]) not in _ENDED_BADLY:
            raise InputError(f"{run.folder} has gone on since it was listed, and stays")
        aside = run.folder.with_name(f".deleted-{run.folder.name[:100]}-{uuid.uuid4().hex[:8]}")
        atomic_files.touch("delete", run.folder)
        run.folder.rename(aside)
    with atomic_files.refusal(aside):
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "manifest.json"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        aside.rmdir()


def _reason_to_keep(run: ListedRun, root: Path) -> str | None:
    """Return why a run may not be deleted, whatever its state; None where it may."""
    manifest, folder = run.manifest, run.folder
    if not (manifest.recipe_digest and manifest.started and {"model", "data"} <= manifest.recipe.keys()):
        return "its manifest.json is not one that a run wrote"
    if any(path.is_symlink() for path in (folder, *folder.parents) if path.is_relative_to(root)):
        return "it is reached through a link. Name the folder that the link leads to"
    try:
        refuse_links(folder)
    except InputError as error:
        return str(error)
    if any((above / SWEEP).is_file() for above in folder.resolve().parents):
        return "it is a trial of a sweep, which goes back to it. Delete the whole sweep's folder, if that is wanted"
    if any(path != folder / "manifest.json" for path in folder.rglob("manifest.json")):
        return "another run's folder lies in it"
    if (folder / SUBMISSIONS).is_file():
        return "a public score is noted for it"
    return None
