"""The loss picture: every step of every stage, on one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fast_ft.rundir import write_bytes


def loss_picture(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draw loss (nats a token) and learning rate over steps from log.jsonl's lines, stages marked; writes a PNG."""
    import io

    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [line["loss"] for line in lines], color="#1f5fa8", linewidth=1, alpha=0.45, label="each step")
    axes.plot(steps, _smoothed([line["loss"] for line in lines]), color="#1f5fa8", linewidth=2, label="mean of 10")
    borders = [b["step"] - 0.5 for a, b in pairwise(lines) if a["stage"] != b["stage"]]
    for border in borders:
        axes.axvline(border, color="#888888", linestyle="--", linewidth=1)
    starts = [steps[0] - 0.5, *borders]
    names = [line["stage"] for i, line in enumerate(lines) if i == 0 or lines[i - 1]["stage"] != line["stage"]]
    for start, name in zip(starts, names, strict=True):
        axes.annotate(name, (start, 1), xycoords=("data", "axes fraction"), xytext=(5, -12), textcoords="offset points")
    bad = [line["step"] for line in lines if line["skipped"] or not math.isfinite(line["loss"])]
    if bad:
        axes.plot(bad, [0] * len(bad), "x", color="#b3261e", label="skipped or not finite", clip_on=False)
    axes.set(
        xlabel="optimizer step", ylabel="loss on the responses, nats a token", xlim=(steps[0] - 0.5, steps[-1] + 0.5)
    )
    axes.set_ylim(bottom=0)
    rate = axes.twinx()
    rate.plot(steps, [line["learning_rate"] for line in lines], color="#b06000", linewidth=1, label="learning rate")
    rate.set_ylabel("learning rate", color="#b06000")
    rate.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean over the last `width` finite values."""
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means
