"""Least squares with factors that are not negative, by coordinate descent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PULL = 0.05  #: how strongly a factor that is twice what it is expected to be counts, as a relative error


def least_squares(
    values: Sequence[Sequence[float]], wanted: Sequence[float], weights: Sequence[float] | None = None,
    expected: Sequence[float] | None = None,
) -> list[float]:  # fmt: skip
    """Return factors of at least 0 for the columns of `values`, whose sums are `wanted`: least relative errors.

    `weights` are in the place of 1 over what is wanted. Factors are pulled towards those that are `expected`. Columns
    are taken one after the other until none changes (coordinate descent).
    """
    scale = np.array(weights if weights is not None else [1 / each for each in wanted])
    columns, target = np.array(values, dtype=float) * scale[:, None], np.array(wanted) * scale
    if expected is not None:
        columns = np.vstack([columns, np.diag([_PULL / each for each in expected])])
        target = np.concatenate([target, np.full(len(expected), _PULL)])
    factors = np.zeros(columns.shape[1])
    left = target.copy()
    squares = (columns**2).sum(0)
    for _ in range(20_000):
        before = factors.copy()
        for i in np.flatnonzero(squares):
            better = max(0.0, factors[i] + columns[:, i] @ left / squares[i])
            left += columns[:, i] * (factors[i] - better)
            factors[i] = better
        if (np.abs(factors - before) <= 1e-9 * np.abs(factors)).all():
            break
    return [float(each) for each in factors]
