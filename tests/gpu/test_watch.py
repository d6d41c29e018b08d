"""On a card: a step's seconds are its own, however late its trainer reads them."""

from __future__ import annotations

import time

import pytest
import torch

from bench.watch import Watch

pytestmark = pytest.mark.gpu
LONG, SHORT = 400_000_000, 40_000_000  #: cycles, some 0.2 s and 0.02 s


def test_a_step_that_is_read_after_the_next_was_launched_has_its_own_seconds() -> None:
    watch = Watch(time.monotonic())
    torch.cuda._sleep(SHORT)  # what the first step must not count
    watch.train_began()
    watch.step_began()
    for index, cycles in enumerate((SHORT, LONG, SHORT, LONG, SHORT)):
        torch.cuda._sleep(cycles)
        if index == 1:  # as where gradients are looked at
            watch._pause(lambda: time.sleep(0.5))
        watch.step_launched(skipped=False)
        if index:
            time.sleep(0.01)
            watch.logged(1.0, 1.0)
    watch.logged(1.0, 1.0)
    seconds = [step["seconds"] for step in watch.steps]
    short, long = (sorted(seconds[first::2]) for first in (0, 1))
    assert len(seconds) == 5 and long[0] > 5 * short[-1], seconds
