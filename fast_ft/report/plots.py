"""Pictures for slides: the loss over all stages, and the map of the rows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common.atomic_files import write_bytes
from fast_ft.common.wording import counted

if TYPE_CHECKING:
    import pyarrow as pa

#: Colours and marks of the stages: told apart without colour too, and by most who see few colours.
COLOURS = ("#0b57d0", "#c2410c", "#11783f", "#8b2fb5", "#9a6700", "#b0186b")
#: The page's colours in its light theme; static/report.css has them too.
INK, SOFT, LINE, EDGE, CARD, BAD = "#1b1f24", "#57606a", "#d5dae0", "#7d8790", "#ffffff", "#a8201a"
MARKS = ("o", "s", "^", "D", "o", "s")


def loss_picture(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draw loss (nats per token) and, below it, the learning rate over log.jsonl's steps, stages marked; writes a PNG.

    It looks as the report's page does: its colours, one quantity a chart, each step faint and their mean strong.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    width, rates = smooth_width(len(lines)), [line["learning_rate"] for line in lines]
    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained", facecolor=CARD)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot(steps, losses, color=COLOURS[0], linewidth=1, alpha=0.35, label="each step")
    means = smoothed(losses, width, [line.get("supervised_tokens") or 1 for line in lines])
    loss.plot(steps, means, color=COLOURS[0], linewidth=2.5, label=f"mean of {width} steps")
    measured = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if measured := [pair for pair in measured if math.isfinite(pair[1])]:
        loss.plot(*zip(*measured, strict=True), color=COLOURS[1], marker="o", markersize=4, label="validation")
    rate.plot(steps, rates, color=COLOURS[0], linewidth=1.8)
    bad = [line["step"] for line in lines if line["skipped"] or not math.isfinite(line["loss"])]
    if bad:
        loss.plot(bad, [0] * len(bad), "x", color=BAD, label="skipped or not finite", clip_on=False)
    starts = [(lines[0]["stage"], steps[0] - 0.5)] + [
        (b["stage"], b["step"] - 0.5) for a, b in pairwise(lines) if a["stage"] != b["stage"]
    ]
    for axes in (loss, rate):
        for _, start in starts[1:]:
            axes.axvline(start, color=EDGE, linestyle="--", linewidth=1)
    for name, start in starts if len(starts) > 1 else ():
        loss.annotate(name, (start, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                      textcoords="offset points", color=SOFT)  # fmt: skip
    # Room above the highest value: the stages' names stand there, and no curve lies on the frame.
    highest = max((value for value in [*losses, *(v for _, v in measured)] if math.isfinite(value)), default=1.0)
    loss.set_ylim(0, highest * 1.15 or 1.0)
    rate.set_ylim(0, max(rates) * 1.15 or 1.0)
    rate.set(xlabel="step", xlim=(steps[0] - 0.5, steps[-1] + 0.5))
    for axes, title in ((loss, "Loss, nats per trained token"), (rate, "Learning rate")):
        _plain(axes, title)
    loss.legend(loc="upper right", frameon=False, labelcolor=SOFT, fontsize=9)
    _save(figure, path)


def _plain(axes: Any, title: str) -> None:
    """Make axes look as the page's charts: a title at the left, a light grid, no frame."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.xaxis.label.set_color(SOFT)
    axes.set_facecolor(CARD)


def map_picture(path: Path, table: pa.Table, stages: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Draw all rows by conversation length and score (without scores, by response length); writes a PNG.

    table: an Arrow table with the columns conversation_words, score and response_words. stages: names with positions
    of rows; a row has the colour of the first stage that holds it.
    """
    import numpy as np
    from matplotlib.figure import Figure

    across = table["conversation_words"].to_numpy()
    scored = table["score"].null_count < table.num_rows
    up = table["score" if scored else "response_words"].to_numpy()
    if scored:  # rows of equal score would cover one another
        levels = np.unique(up[~np.isnan(up)])
        gap = np.diff(levels).min() if 1 < len(levels) <= 25 else 0.0
        up = up + np.random.default_rng(0).uniform(-0.38, 0.38, len(up)) * gap
    across = across + np.random.default_rng(1).uniform(-0.4, 0.4, len(across))
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    alpha = 0.6 if table.num_rows < 5_000 else 0.12
    axes.scatter(across, up, s=4, color="#5c6875", alpha=alpha, linewidths=0, rasterized=True)
    seen: set[int] = set()
    for number, (name, positions) in enumerate(stages):
        own = [position for position in positions if position not in seen]
        seen.update(own)
        if own:
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
            axes.scatter(across[own], up[own], s=26, color=colour, marker=mark, edgecolors="white", linewidths=0.5,
                         label=f"{name}: {counted(len(own), 'row')}")  # fmt: skip
    axes.set(xscale="log", xlabel="words in prompt and response", ylabel="score" if scored else "words in the response")
    if not scored:
        axes.set_yscale("log")
    for axis in (axes.xaxis, *(() if scored else (axes.yaxis,))):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    figure.legend(loc="outside upper right", ncols=6, frameon=False, title=f"{len(seen)} of {table.num_rows:,} rows")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def smooth_width(steps: int) -> int:
    """Return of how many steps a smoothed value is the mean; static/curves.js has the same rule."""
    return max(10, round(steps / 20))


def smoothed(values: Sequence[float], width: int, weights: Sequence[float]) -> list[float]:
    """Return the weighted mean over the last `width` finite values, for each of them."""
    means = []
    for end in range(1, len(values) + 1):
        pairs = zip(values[max(0, end - width) : end], weights[max(0, end - width) : end], strict=True)
        window = [(value * weight, weight) for value, weight in pairs if math.isfinite(value)]
        total = sum(weight for _, weight in window)
        means.append(sum(value for value, _ in window) / total if total else math.nan)
    return means
