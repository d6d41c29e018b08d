"""Seconds by name: each counts once."""

from __future__ import annotations

import itertools

import pytest

from fast_ft.common.stopwatch import Stopwatch


def test_inner_names_are_taken_out_of_outer_ones_and_all_seconds_are_there() -> None:
    clock = itertools.count().__next__  # a second between two looks
    watch = Stopwatch(lambda: float(clock()))
    with watch.during("steps"), watch.during("captures"):
        pass
    with pytest.raises(ZeroDivisionError), watch.during("steps"):
        _ = 1 // 0
    assert watch.seconds() == {"other": 3.0, "steps": 3.0, "captures": 1.0}


def test_a_check_that_decodes_is_a_check() -> None:
    clock = itertools.count().__next__
    watch = Stopwatch(lambda: float(clock()))
    with watch.during("checks", covers=frozenset({"steps"})):
        with watch.during("steps"):
            pass
        with watch.during("captures"), watch.during("steps"):
            pass
    with watch.during("steps"):
        pass
    found = watch.seconds()
    assert found["steps"] == 2.0 and sum(found.values()) == clock() - 1
