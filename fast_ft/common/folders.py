"""Folders that will be written to: made, refused if their disk is not mounted, guarded while a run holds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fast_ft.common.errors import InputError

DRIVE = Path("/content/drive")  #: where Colab mounts Google Drive; its own files are in MyDrive and Shareddrives
MOUNT_DRIVE = 'from google.colab import drive; drive.mount("/content/drive")'
#: Each folder in one of these is where a disk is mounted.
PLACES = (Path("/mnt"), Path("/media"), Path("/Volumes"))
PACKAGE = Path(__file__).resolve().parents[1]
#: What comes with the program: the recipes, and the small base model with its rows.
SHIPPED = ("recipes/", "fast_ft/pocket/")
#: Of the folders that this process holds. It is the module's, since writes come from everywhere; see `guarded`.
_guards: dict[Path, Callable[[], object]] = {}


@contextlib.contextmanager
def guarded(root: Path, check: Callable[[], object]) -> Iterator[None]:
    """Call `check` before each write below `root`, as long as this lasts; what it raises stops the write."""
    _guards[root] = check
    try:
        yield
    finally:
        del _guards[root]


def guard(path: Path) -> None:
    """Call the check of each guarded folder that `path` lies in."""
    for root, check in list(_guards.items()):
        if path.is_relative_to(root):
            check()


def expanded(name: str) -> Path:
    """Return the path that `name` stands for, ~ replaced; ~name stays as it is where there is no such user.

    A name below SHIPPED that is not here means the file that came with the program, so that the shipped recipes run in
    any folder, with the same names in them.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises there
    own = shipped(name) if not os.path.lexists(path) else None  # lexists is False for a name that no file can have
    return own or path


def shipped(name: str) -> Path | None:
    """Return the file or folder that came with the program under this name, such as recipes/strong.yaml, or None.

    In a checkout the recipes lie beside the package, and in an installed copy they lie in it.
    """
    if not name.startswith(SHIPPED) or ".." in name:
        return None
    places = (PACKAGE.parent / name, PACKAGE / name)
    return next((place for place in places if os.path.lexists(place)), None)


def is_folder(name: str) -> bool:
    """Return whether `name` is a folder here. No text is an error: the system refuses some, such as 5,000 letters."""
    try:
        return expanded(name).is_dir()
    except OSError:
        return False


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, and return what was made, the deepest first.

    Raises InputError where that is refused, or where the folder's disk is not mounted.
    """
    try:
        refuse_unmounted(folder)
        absent = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # of whatever kind: the folder is one that a user named
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise InputError(
            f"cannot make the folder {folder}: {reason}. Name another one, or make what is above it writable"
        ) from error
    return absent


def refuse_unmounted(folder: Path) -> None:
    """Raise InputError where `folder` lies on a disk, or on a Google Drive, that is not mounted."""
    path = Path(os.path.realpath(folder))  # a link to such a folder counts as that folder
    for place in (DRIVE, *PLACES):
        if not path.is_relative_to(place):
            continue
        below = path.relative_to(place).parts or (("MyDrive",) if place == DRIVE else ())
        if not below or (place / below[0]).exists():
            continue
        if place == DRIVE:
            raise InputError(
                f"{folder}: Google Drive is not mounted, since there is no {place / below[0]}. Mount it in a cell of "
                f"the notebook, then run the command again:\n  {MOUNT_DRIVE}"
            )
        raise InputError(
            f"{folder}: there is no {place / below[0]}, so its disk is not mounted. Mount it, then run the command "
            f"again; or name a folder elsewhere. If no disk belongs there, make the folder: mkdir {place / below[0]}"
        )
