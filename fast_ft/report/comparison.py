"""Several runs side by side: what each came to, how each pair differs, and which settings are not the same."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from fast_ft.report import overview, result
from fast_ft.report.html import COLOURS, bullets, details, paragraph, table
from fast_ft.report.run_data import Run, prompt_scores
from fast_ft.run import time_spent
from fast_ft.run.folder import differences

MOST_PAIRED = 4  #: runs of which each pair is compared; of more, each with the first one


def compared(runs: Sequence[Run]) -> str:
    """Return the scores of all runs, a sentence for each pair, the results, and the settings that differ."""
    names = [run.name for run in runs]
    scored = [run for run in runs if run.scores is not None]
    parts = [f'<div class="scores">{"".join(_card(at, run) for at, run in enumerate(runs))}</div>']
    if scored:
        parts.append(paragraph(_judged(scored), "hint"))
    pairs = combinations(runs, 2) if len(runs) <= MOST_PAIRED else ((runs[0], run) for run in runs[1:])
    parts.append(f"<h3>Pair by pair</h3>{bullets(pair(one, other) for one, other in pairs)}")
    parts.append(f"<h3>Results</h3>{table(('', *names), _results(runs), numbers=True, runs=True)}")
    first = runs[0]
    keys = dict.fromkeys(k for run in runs[1:] for k in differences(first.recipe, run.recipe, ("output_dir",)))
    rows = [[key, *(_show(_at(run.recipe, key)) for run in runs)] for key in keys]
    settings = table(("key", *names), rows, runs=True) if rows else paragraph("The recipes are the same.")
    parts.append(f"<h3>Settings that differ</h3>{settings}")
    told = [f"{run.name}: {overview.sentence(run, None)}" for run in runs]
    return "\n".join([*parts, details("Each run in a sentence", bullets(told))])


def pair(one: Run, other: Run) -> str:
    """Return one sentence on how two runs' scores differ."""
    if one.scores is None or other.scores is None:
        without = " and ".join(run.name for run in (one, other) if run.scores is None)
        return f"{one.name} and {other.name} cannot be compared: no scores of {without}."
    if one.scores.judge != other.scores.judge:
        return f"{one.name} and {other.name} were scored by different judges: their scores cannot be compared."
    ours, theirs = prompt_scores(other.scores), prompt_scores(one.scores)
    return result.difference(one.scores, other.name, ours, one.name, theirs)


def _judged(scored: Sequence[Run]) -> str:
    judges = {run.scores.judge for run in scored if run.scores is not None}
    if len(judges) > 1 or scored[0].scores is None:
        return "These runs were scored by different judges: their scores cannot be compared."
    return result.measure(scored[0].scores)


def _card(place: int, run: Run) -> str:
    scores = run.scores
    value = result.shown(scores, scores.mean) if scores is not None else "–"
    said = result.interval(scores, scores) if scores is not None else "no score"
    return (
        f'<div class="big"><h3 class="run g{place % COLOURS}">{html.escape(run.name)}</h3><p class="value">{value}</p>'
        f'<p class="soft">{html.escape(said)}</p></div>'
    )


def _results(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of results. Peak memory stands there where one of the runs was on a GPU."""
    yield "mean score", *(result.shown(run.scores, run.scores.mean) if run.scores else "–" for run in runs)
    yield "loss, mean of the last epoch", *(overview.number(overview.last_loss(run)) for run in runs)
    yield "training minutes", *(time_spent.shown(time_spent.step_minutes(run.lines)) for run in runs)
    yield "minutes of all phases", *(time_spent.shown(run.minutes) for run in runs)
    peaks = [run.manifest.phase("train").peak_gib for run in runs]
    if any(peaks):
        yield "peak GPU memory, GiB", *(overview.number(peak or None) for peak in peaks)


def _at(recipe: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
