"""The parts of the page that need no script: a run in a sentence, its figures, budget, recipe, environment."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.judge.kinds import KINDS
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Train
from fast_ft.report.html import bullets, details, table
from fast_ft.report.result import shown
from fast_ft.report.run_data import Run, memory_cap
from fast_ft.run import epoch_loss, time_spent
from fast_ft.run.manifest import Environment


def sentence(run: Run, pool_rows: int | None) -> str:
    """Return what the run did, in words."""
    recipe, rows = run.recipe, run.manifest.rows
    size = f"{len(rows)} of {counted(pool_rows, 'row')}" if pool_rows else counted(len(rows), "row")
    name = recipe.get("run_name") or Path(run.manifest.recipe_file or run.name).stem
    text = f"{name}: {recipe['model']['name_or_path']} with LoRA (rank {recipe['lora']['r']}) on {size}"
    loss = epoch_loss.sentence(run.lines, run.manifest.staged(), _batch(run))
    if "train" not in run.manifest.phases or loss is None:
        return f"{text}; training is not finished, after {counted(len(run.lines), 'step')}."
    stages = [stage.name for stage in run.manifest.stages]
    over = f" over {len(stages)} stages ({', '.join(stages)})" if len(stages) > 1 else ""
    text += f", in {counted(len(run.lines), 'step')}{over}; {loss}."
    if run.pred:
        ended = [answer.ended for answer in run.ended.get("tuned", {}).values()]
        whole = f"; {counted(sum(ended), 'answer')} ended without being cut" if ended else ""
        text += f" It answered {counted(len(run.pred), 'prompt')}{whole}."
    if run.scores is not None and run.scores.mean is not None:
        base = run.scores.base.mean if run.scores.base is not None else None
        was = f", where the base model had {shown(run.scores, base)}" if base is not None else ""
        name = "Exact matches" if KINDS[run.scores.kind].is_share else "Mean score"
        text += f" {name}: {shown(run.scores, run.scores.mean)}{was}."
    return text


def settings(run: Run, notes: Sequence[str]) -> str:
    """Return the last section: budget, recipe, environment and notes."""
    from yaml import safe_dump

    recipe = safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
    all_notes = [*notes, *run.manifest.notes, *(run.scores.notes if run.scores is not None else [])]
    parts = [
        "<h3>Budget</h3>",
        table(("", "budget", "used", "share"), _budget(run), numbers=True),
        details("The recipe, with every default", f'<pre tabindex="0">{html.escape(recipe)}</pre>'),
        details("Environment", table(("what", "version"), _environment(run.manifest.environment))),
    ]
    if all_notes:
        parts.append(details(f"Notes ({len(all_notes)})", bullets(all_notes)))
    return "\n".join(parts)


def figures(run: Run) -> str:
    """Return what the run took, as a row of figures."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _figures(run)
    )
    return f'<dl class="figures">{cells}</dl>'


def _figures(run: Run) -> Iterator[tuple[str, str]]:
    peak = run.manifest.phase("train").peak_gib
    yield "rows trained on", f"{len(run.manifest.rows):,}"
    yield "steps", f"{len(run.lines):,}"
    yield "minutes, all phases", time_spent.shown(run.minutes)
    if peak:
        yield "peak GPU memory, GiB", f"{peak:.2f}"


def _budget(run: Run) -> Iterator[tuple[str, ...]]:
    budget, decoding = run.recipe.get("budget", {}), run.manifest.phase("generate").decoding_seconds
    used = {"train_minutes": time_spent.step_minutes(run.lines), "generate_minutes": decoding / 60}
    allowed = policy_ntu_hw5.MINUTES if run.recipe.get("rules") else budget
    for key, name in (("train_minutes", "training, minutes"), ("generate_minutes", "answers, minutes")):
        yield name, number(allowed.get(key)), number(used[key]), _share(used[key], allowed.get(key))
    cap, peak = memory_cap(run), run.manifest.phase("train").peak_gib
    if peak:  # of a GPU: on a CPU memory is not counted
        yield "GPU memory, GiB", number(cap), number(peak), _share(peak, cap)


def _batch(run: Run) -> int:
    given = run.recipe.get("train", {}).get("effective_batch_size")
    return given if isinstance(given, int) and given > 0 else Train().effective_batch_size


def last_loss(run: Run) -> float | None:
    """Return the mean loss of the last epoch (nats per token); None where there is no finite one."""
    found = epoch_loss.first_and_last(run.lines, run.manifest.staged(), _batch(run))
    return found[1] if found is not None else None


def _environment(environment: Environment) -> Iterator[tuple[str, str]]:
    yield "GPU", ", ".join(environment.gpu.values()) if environment.gpu else "none"
    yield "system", environment.system or "not recorded"
    yield "python", environment.python or "not recorded"
    for name, version in environment.packages.items():
        yield name, version or "not installed"


def _share(used: float | None, budget: Any) -> str:
    return f"{used / budget:.0%}" if used and isinstance(budget, int | float) and budget else "–"


def number(value: Any) -> str:
    """Return a number with at most two decimals, or a dash."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else "–"
