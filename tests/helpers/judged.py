"""Judging with a short backoff, and what the server of judge_server.py scores."""

from __future__ import annotations

from typing import Any

from fast_ft.judge import rubric
from fast_ft.judge.scoring import Group
from fast_ft.pipeline import judge_phase
from fast_ft.run.folder import RunDir
from tests.helpers.judge_server import scores_for

KEY = "sk-test-3b1f0e77c2d94d10"
COUNT = 24  #: answers of a run folder


def judged(folder: RunDir, group: Group | None = None, **options: Any) -> dict[str, Any]:
    """judge_run with a short backoff."""
    section = folder.recipe().judge
    asked = judge_phase.JudgeOptions(backoff=0.01, **options)
    result = judge_phase.judge_run(folder, section, group or Group(), seed=1, options=asked)
    assert result is not None
    return result


def expected(folder: RunDir, words: str = "tuned") -> dict[str, float]:
    return {
        str(i): float(scores_for(rubric.pair(f"Q {i}?", f"It is {i}.", f"{words} {i}")[-1]["content"])[1])
        for i in range(COUNT)
    }


def found(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: each["score"] for key, each in scores["prompts"].items()}
