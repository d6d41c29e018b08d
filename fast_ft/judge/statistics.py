"""How sure a mean is: bootstrap intervals over prompts, and paired differences between two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fast_ft.common.wording import counted

LEAST = 10  #: scores; with fewer ones a percentile interval is too narrow to mean what it says, so there is none
RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # draws held in memory


def interval(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean (Efron 1979), or None for fewer than LEAST values.

    The prompts are drawn again, not the judge: it tells how far other prompts of the same kind might move the mean.
    """
    if len(values) < LEAST:
        return None
    import numpy as np

    scores_N, generator, means = np.asarray(values, dtype=float), np.random.default_rng(seed), []
    for begin in range(0, RESAMPLES, rows := max(1, _AT_ONCE // len(values))):
        drawn_RN = generator.integers(len(values), size=(min(rows, RESAMPLES - begin), len(values)))
        means.append(scores_N[drawn_RN].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def summary(scores: Sequence[float | None], seed: int) -> dict[str, Any]:
    """Return {mean, low, high, count, missing, missing_share} of scores; None is a missing one and counts nowhere."""
    there = [score for score in scores if score is not None]
    # Equal scores resample to themselves: an interval of width 0 would claim a certainty that nobody has.
    bounds = interval(there, seed) if len(set(there)) > 1 else None
    missing = len(scores) - len(there)
    return {
        "mean": mean(there),
        "low": rounded(bounds and bounds[0]),
        "high": rounded(bounds and bounds[1]),
        "count": len(scores),
        "missing": missing,
        "missing_share": rounded(missing / len(scores)) if scores else 0.0,
    }


def compare(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], seed: int, name: str
) -> dict[str, Any]:
    """Return how `ours` differs from `theirs` ({prompt id: score}), prompt by prompt: see `against` in
    judge/scoring.py.

    `name` is what the sentence calls the other one.
    """
    pairs = [(a, b) for key, a in ours.items() if a is not None and (b := theirs.get(key)) is not None]
    gains = [a - b for a, b in pairs]
    bounds = interval(gains, seed)
    more = None if bounds is None else bounds[0] > 0 or bounds[1] < 0
    content: dict[str, Any] = {
        "run": name,
        "count": len(pairs),
        "mean": mean([a for a, _ in pairs]),
        "other_mean": mean([b for _, b in pairs]),
        "difference": mean(gains),
        "low": rounded(bounds and bounds[0]),
        "high": rounded(bounds and bounds[1]),
        "wins": sum(gain > 0 for gain in gains),
        "ties": sum(gain == 0 for gain in gains),
        "losses": sum(gain < 0 for gain in gains),
        "more_than_noise": more,
    }
    return content | {"sentence": _sentence(content)}


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, rounded for JSON, or None of nothing."""
    return rounded(sum(values) / len(values)) if values else None


def rounded(value: float | None) -> float | None:
    """Return a number as scores.json has it, with 4 decimals."""
    return None if value is None else round(float(value), 4)


def _sentence(content: Mapping[str, Any]) -> str:
    name, count = content["run"], content["count"]
    if not count:
        return f"No prompt has a score both here and in {name}: nothing to compare."
    more = round(content["difference"], 2)
    said = f"{abs(more):.2f} {'more' if more > 0 else 'less'} than" if more else "the same as"
    said = f"This run scores {said} {name} on {counted(count, 'prompt')}"
    if content["more_than_noise"] is None:
        return f"{said}; this is too few to tell a difference from noise."
    between = f"95 % interval of the difference {content['low']:+.2f} to {content['high']:+.2f}"
    verdict = "more than noise" if content["more_than_noise"] else "no more than noise"
    return f"{said} ({between}): {verdict}."
