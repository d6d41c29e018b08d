"""When Python looks for reference cycles: seldom while libraries are imported, and then among new objects only.

Importing torch, transformers, PEFT and TRL makes some millions of objects, and hardly any cycles: a quarter of its time
went into looking for them. With all libraries loaded, one look at everything takes half a second. As a program ends,
Python looks several times, and takes apart what the system takes back anyway: a command ended two seconds after its
last word.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

USUAL = gc.get_threshold()  #: of this Python, as the program begins
_SELDOM = (200_000, 20, 20)  #: objects made before the youngest are looked at; how many such looks before older ones


def seldom() -> None:
    """Look for cycles seldom from here on, and not as the program ends: a command begins, and imports what it needs.

    What is to be done at the end of the program, such as removing temporary folders, is done before.
    """
    gc.set_threshold(*_SELDOM)
    atexit.register(_leave_to_the_system)


def _leave_to_the_system() -> None:
    gc.disable()
    gc.freeze()


@contextlib.contextmanager
def new_objects_only() -> Iterator[None]:
    """Look within as often as Python does, at what is made within. What there is now is left out, its cycles too."""
    gc.set_threshold(*USUAL)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
