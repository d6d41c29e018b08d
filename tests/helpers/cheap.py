"""What makes tests cheap: imports as a command's, no wait for a disk, no drawing, no collection over the libraries."""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fast_ft.common import environment

#: A PNG of one pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")
_drawing: dict[str, Callable[..., None]] = {}


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Import libraries within as cheaply as a command does: without bitsandbytes' compiler, and without collections.

    What is imported stays out of later collections. A quarter of the time went into the two.
    """
    gc.disable()
    try:
        with environment.without_compiler():
            yield
    finally:
        gc.enable()
    gc.freeze()
    _remember_no_stacks()
    _look_once_for_packages()


def _remember_no_stacks() -> None:
    """Let torch, where there is no card, note no stack at each seed that a card would get once it is there."""
    torch = sys.modules.get("torch")
    if torch is not None and shutil.which("nvidia-smi") is None:  # torch itself, asked, would spoil it for forks
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            kind.traceback = SimpleNamespace(format_stack=list)


def _look_once_for_packages() -> None:
    """Let accelerate read a package's metadata once; Trainer and TRL ask for PEFT's some ten times a run."""
    imports: Any = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = functools.cache(imports._is_package_available)


def wait_for_no_disk() -> None:
    """Make fsync do nothing: no test loses power, and each wait for a disk takes milliseconds."""
    os.fsync = lambda fd: None


def draw(truly: bool) -> None:
    """Let matplotlib, where it is imported, draw truly or save a pixel: drawing is a third of a small run's time."""
    figure = sys.modules.get("matplotlib.figure")
    if figure is not None:
        _drawing.setdefault("savefig", figure.Figure.savefig)
        figure.Figure.savefig = _drawing["savefig"] if truly else _save_a_pixel


def _save_a_pixel(figure: Any, file: Any, **values: Any) -> None:
    file.write(PIXEL) if hasattr(file, "write") else Path(file).write_bytes(PIXEL)


class FreezeImports:
    """A callback of gc: once a full collection is over, keep the modules imported since the last out of later ones.

    A run asks for four full collections, and a million objects of the libraries take a third of a second in each.
    """

    def __init__(self) -> None:
        self.known = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2 and len(sys.modules) > self.known + 100:
            self.known = len(sys.modules)
            gc.freeze()
