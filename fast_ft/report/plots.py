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
MARKS = ("o", "s", "^", "D", "o", "s")


def loss_picture(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draw loss (nats per token) and learning rate over steps from log.jsonl's lines, stages marked; writes a PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [line["loss"] for line in lines], color="#1f5fa8", linewidth=1, alpha=0.45, label="each step")
    axes.plot(steps, _smoothed([line["loss"] for line in lines]), color="#1f5fa8", linewidth=2, label="mean of 10")
    measured = [line for line in lines if math.isfinite(line.get("validation_loss", math.nan))]
    if measured:
        axes.plot([line["step"] for line in measured], [line["validation_loss"] for line in measured],
                  color="#11783f", marker="o", markersize=4, linewidth=1.5, label="validation")  # fmt: skip
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
        xlabel="optimizer step", ylabel="loss on trained tokens, nats per token", xlim=(steps[0] - 0.5, steps[-1] + 0.5)
    )
    # Room above the highest value: the stages' names stand there, and no curve lies on the frame.
    losses = [line[name] for line in lines for name in ("loss", "validation_loss") if name in line]
    highest = max(filter(math.isfinite, losses), default=1.0)
    axes.set_ylim(0, highest * 1.15 or 1.0)
    rate = axes.twinx()
    rates = [line["learning_rate"] for line in lines]
    rate.plot(steps, rates, color="#b06000", linewidth=1, label="learning rate")
    rate.set_ylabel("learning rate", color="#b06000")
    rate.set_ylim(0, max(rates) * 1.15 or 1.0)
    handles = [*axes.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    _save(figure, path)


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


def _smoothed(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean over the last `width` finite values."""
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means
