"""Parsers of recipe, data, pred and scores meet thousands of wrong files: only InputError may come out.

`python -m tests.fuzz` does the same for as long as wanted, guided by coverage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets as fuzz_targets
from tests.fuzz.targets import ODD, SEEDS, TARGETS

FEW = settings(suppress_health_check=list(HealthCheck), max_examples=150)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", TARGETS)
def test_the_files_to_begin_with_reach_into_the_parser(name: str) -> None:
    passed = [fuzz_targets.run(name, seed) for seed in SEEDS[name]]
    assert any(passed) if name in ("recipe", "data") else all(passed)  # of those two some are wrong to begin with


@pytest.mark.parametrize("name", ["pred", "scores", "manifest", "submissions", "sweep", "clock"])
def test_a_key_of_another_kind_or_absent_ends_in_a_message_at_worst(name: str) -> None:
    """Each key of a run's files in turn: absent, null, and of each kind that it may not be."""
    for seed in SEEDS[name]:
        content = json.loads(seed)
        for parent, key in list(_places(content)):
            was = parent[key]
            for odd in (None, 7, 10**400, "x", [7], {"x": 7}):
                parent[key] = odd
                fuzz_targets.run(name, json.dumps(content).encode())
            if isinstance(parent, dict):
                del parent[key]
                fuzz_targets.run(name, json.dumps(content).encode())
            parent[key] = was


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@FEW
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_and_any_json_end_in_a_message_at_worst(content: bytes) -> None:
    """Every parser gets the same contents: drawing one takes longer than most parsers need for it."""
    for name in TARGETS:
        run(name, content)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_end_in_a_message_at_worst(name: str) -> None:
    chance, known = random.Random(f"{name} 1"), set()
    for _ in range({"recipe": 300, "zips": 300, "submissions": 300, "verdicts": 300, "journal": 150}.get(name, 1500)):
        content = chance.choice(SEEDS[name])
        for _ in range(chance.choice((1, 1, 2))):
            content = fuzz_targets.changed(content, chance)
        if content not in known:  # some small files come again and again
            known.add(content)
            run(name, content)


def run(name: str, content: bytes) -> None:
    """Feed a target; an exception that comes out names the target and its content."""
    try:
        fuzz_targets.run(name, content)
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__} from {content[:2000]!r}") from error
