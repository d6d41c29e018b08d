"""The parts of the page that need no script: a run in a sentence, its figures, budget, recipe; several compared."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.judge import statistics
from fast_ft.judge.kinds import KINDS
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Train
from fast_ft.report.html import bullets, details, paragraph, table
from fast_ft.report.run_data import Run, memory_cap, prompt_scores
from fast_ft.run import epoch_loss, time_spent
from fast_ft.run.folder import differences
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
    tuned, before = _means(run)
    if tuned is not None:
        was = f", where the base model had {_score(run, before)}" if before is not None else ""
        measure = "Exact matches" if _is_share(run) else "Mean score"
        text += f" {measure}: {_score(run, tuned)}{was}."
    return text


def overview(run: Run, pool_rows: int | None, notes: Sequence[str]) -> str:
    """Return the first section: sentence, figures, budget, recipe, environment."""
    from yaml import safe_dump

    figures = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _figures(run)
    )
    recipe = safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
    environment = [*_environment(run.manifest.environment)]
    all_notes = [*notes, *run.manifest.notes, *(run.scores.notes if run.scores is not None else [])]
    parts = [
        paragraph(sentence(run, pool_rows), "lead"),
        f'<dl class="figures">{figures}</dl>',
        "<h3>Budget</h3>",
        table(("", "budget", "used", "share"), _budget(run), numbers=True),
        details("The recipe, with every default", f'<pre tabindex="0">{html.escape(recipe)}</pre>'),
        details("Environment", table(("what", "version"), environment)),
    ]
    if all_notes:
        parts.append(details(f"Notes ({len(all_notes)})", bullets(all_notes)))
    return "\n".join(parts)


def differing(runs: Sequence[Run]) -> str:
    """Return the table of recipe keys that differ, and wins, ties and losses against the first run."""
    first = runs[0]
    keys = list(dict.fromkeys(k for run in runs[1:] for k in differences(first.recipe, run.recipe, ("output_dir",))))
    flat = [{key: _at(run.recipe, key) for key in keys} for run in runs]
    names = [run.name for run in runs]
    rows = [[key, *(_show(values[key]) for values in flat)] for key in keys]
    parts = [f"<h3>Recipes</h3>{table(('key', *names), rows) if rows else paragraph('The recipes are the same.')}"]
    results = [
        ("training minutes", *(time_spent.shown(time_spent.step_minutes(run.lines)) for run in runs)),
        ("all minutes", *(time_spent.shown(run.minutes) for run in runs)),
        ("peak GiB", *(_number(run.manifest.phase("train").peak_gib or None) for run in runs)),
        ("loss, mean of the last epoch", *(_number(_last_loss(run)) for run in runs)),
        ("mean score", *(_score(run, _means(run)[0]) for run in runs)),
    ]
    parts.append(f"<h3>Results</h3>{table(('', *names), results, numbers=True)}")
    versus = [
        statistics.compare(prompt_scores(run.scores), prompt_scores(first.scores), 0, first.name) for run in runs[1:]
    ]
    found = [(run, result) for run, result in zip(runs[1:], versus, strict=True) if result["count"]]
    if found:
        rows = [
            [run.name, r["wins"], r["ties"], r["losses"], f"{r['difference']:+.3f}", _interval(r)] for run, r in found
        ]
        head = ("run", "wins", "ties", "losses", "mean difference", "95 % interval")
        parts.append(f"<h3>Wins, ties, losses against {html.escape(first.name)}</h3>{table(head, rows, numbers=True)}")
        parts += [paragraph(result["sentence"].replace("This run", run.name, 1)) for run, result in found]
        if len({run.scores.judge for run in runs if run.scores is not None}) > 1:
            parts.append(paragraph("These runs were scored by different judges: their scores cannot be compared."))
    else:
        parts.append(paragraph("No prompt has a score in more than one run, so there are no wins and losses to count."))
    return "\n".join(parts)


def _figures(run: Run) -> Iterator[tuple[str, str]]:
    peak, (tuned, before) = run.manifest.phase("train").peak_gib, _means(run)
    yield "rows trained on", f"{len(run.manifest.rows):,}"
    yield "steps", f"{len(run.lines):,}"
    yield "minutes, all phases", time_spent.shown(run.minutes)
    if peak:
        yield "peak GiB", f"{peak:.2f}"
    if before is not None:
        yield "base model", _score(run, before)
    if tuned is not None:
        yield "tuned", _score(run, tuned)


def _budget(run: Run) -> Iterator[tuple[str, ...]]:
    budget, decoding = run.recipe.get("budget", {}), run.manifest.phase("generate").decoding_seconds
    used = {"train_minutes": time_spent.step_minutes(run.lines), "generate_minutes": decoding / 60}
    allowed = policy_ntu_hw5.MINUTES if run.recipe.get("rules") else budget
    for key, name in (("train_minutes", "training, minutes"), ("generate_minutes", "answers, minutes")):
        yield name, _number(allowed.get(key)), _number(used[key]), _share(used[key], allowed.get(key))
    cap, peak = memory_cap(run), run.manifest.phase("train").peak_gib
    yield "GPU memory, GiB", _number(cap), _number(peak or None), _share(peak, cap)


def _batch(run: Run) -> int:
    given = run.recipe.get("train", {}).get("effective_batch_size")
    return given if isinstance(given, int) and given > 0 else Train().effective_batch_size


def _last_loss(run: Run) -> float | None:
    found = epoch_loss.first_and_last(run.lines, run.manifest.staged(), _batch(run))
    return found[1] if found is not None else None


def _environment(environment: Environment) -> Iterator[tuple[str, str]]:
    yield "GPU", ", ".join(environment.gpu.values()) if environment.gpu else "none"
    yield "system", environment.system or "not recorded"
    yield "python", environment.python or "not recorded"
    for name, version in environment.packages.items():
        yield name, version or "not installed"


def _is_share(run: Run) -> bool:
    return run.scores is not None and KINDS[run.scores.kind].is_share


def _means(run: Run) -> tuple[float | None, float | None]:
    """Return the mean score of the run's answers and of the base model's, each None where there is none."""
    if run.scores is None:
        return None, None
    return run.scores.mean, run.scores.base.mean if run.scores.base is not None else None


def _score(run: Run, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0%}" if _is_share(run) else f"{value:.2f}"


def _share(used: float | None, budget: Any) -> str:
    return f"{used / budget:.0%}" if used and isinstance(budget, int | float) and budget else "–"


def _number(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else "–"


def _interval(result: dict[str, Any]) -> str:
    return "–" if result["low"] is None else f"{result['low']:+.3f} to {result['high']:+.3f}"


def _at(recipe: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
