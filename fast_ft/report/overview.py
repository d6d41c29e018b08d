"""The parts of the page that need no script: a run in a sentence, its figures, budget, recipe; several compared."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fast_ft.judge import statistics
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Train
from fast_ft.report.html import bullets, details, paragraph, table
from fast_ft.report.run_data import Run, memory_cap, prompt_scores
from fast_ft.run import epoch_loss
from fast_ft.run.folder import differences


def sentence(run: Run, pool_rows: int | None) -> str:
    """Return what the run did, in words."""
    recipe, rows, train = run.recipe, run.manifest.get("rows", []), run.phases.get("train")
    of = f" of {pool_rows:,}" if pool_rows else ""
    name = Path(str(run.manifest.get("recipe_file", run.name))).stem
    text = f"{name}: {recipe['model']['name_or_path']} with LoRA (rank {recipe['lora']['r']}) on {len(rows)}{of} rows"
    loss = epoch_loss.sentence(run.lines, run.manifest.get("stages", []), _batch(run))
    if not train or loss is None:
        return f"{text}; training is not finished, after {len(run.lines)} steps."
    stages = [stage["name"] for stage in run.manifest.get("stages", [])]
    over = f" over {len(stages)} stages ({', '.join(stages)})" if len(stages) > 1 else ""
    text += f", in {len(run.lines)} steps{over}; {loss}."
    if run.pred:
        ended = [answer.get("ended") for answer in run.ended.get("tuned", {}).values()]
        whole = f", {sum(map(bool, ended))} of them ended by themselves" if ended else ""
        text += f" It answered {len(run.pred)} prompts{whole}."
    if (mean := run.scores.get("mean")) is not None:
        before = run.scores.get("base", {}).get("mean")
        was = f", where the base model had {_score(run, before)}" if before is not None else ""
        text += f" {_measure(run)}: {_score(run, mean)}{was}."
    return text


def overview(run: Run, pool_rows: int | None, notes: Sequence[str]) -> str:
    """Return the first section: sentence, figures, budget, recipe, environment."""
    from yaml import safe_dump

    figures = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _figures(run)
    )
    recipe = safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
    environment = [(name, value) for name, value in _environment(run.manifest.get("environment", {}))]
    all_notes = [*notes, *run.manifest.get("notes", []), *run.scores.get("notes", [])]
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
        ("training minutes", *(f"{_training_minutes(run):.1f}" for run in runs)),
        ("all minutes", *(f"{run.minutes:.1f}" for run in runs)),
        ("peak GiB", *(_number(run.phases.get("train", {}).get("peak_gib") or None) for run in runs)),
        ("loss, mean of the last epoch", *(_number(_last_loss(run)) for run in runs)),
        ("mean score", *(_score(run, run.scores.get("mean")) for run in runs)),
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
        kinds = {json.dumps([run.scores.get(key) for key in ("kind", "model", "rubric")]) for run in runs if run.scores}
        if len(kinds) > 1:
            parts.append(paragraph("These runs were scored by different judges: their scores cannot be compared."))
    else:
        parts.append(paragraph("No prompt has a score in more than one run, so there are no wins and losses to count."))
    return "\n".join(parts)


def _figures(run: Run) -> Iterator[tuple[str, str]]:
    train = run.phases.get("train", {})
    yield "rows trained on", f"{len(run.manifest.get('rows', [])):,}"
    yield "steps", f"{len(run.lines):,}"
    yield "minutes, all phases", f"{run.minutes:.1f}"
    if train.get("peak_gib"):
        yield "peak GiB", f"{train['peak_gib']:.2f}"
    if run.scores.get("base", {}).get("mean") is not None:
        yield "base model", _score(run, run.scores["base"]["mean"])
    if run.scores.get("mean") is not None:
        yield "tuned", _score(run, run.scores["mean"])


def _budget(run: Run) -> Iterator[tuple[str, ...]]:
    budget, generate = run.recipe.get("budget", {}), run.phases.get("generate", {})
    used = {"train_minutes": _training_minutes(run), "generate_minutes": generate.get("decoding_seconds", 0) / 60}
    allowed = policy_ntu_hw5.MINUTES if run.recipe.get("rules") else budget
    for key, name in (("train_minutes", "training, minutes"), ("generate_minutes", "answers, minutes")):
        yield name, _number(allowed.get(key)), _number(used[key]), _share(used[key], allowed.get(key))
    cap, peak = memory_cap(run), run.phases.get("train", {}).get("peak_gib")
    yield "GPU memory, GiB", _number(cap), _number(peak or None), _share(peak, cap)


def _batch(run: Run) -> int:
    given = run.recipe.get("train", {}).get("effective_batch_size")
    return given if isinstance(given, int) and given > 0 else Train().effective_batch_size


def _last_loss(run: Run) -> float | None:
    found = epoch_loss.first_and_last(run.lines, run.manifest.get("stages", []), _batch(run))
    return found[1] if found is not None else None


def _training_minutes(run: Run) -> float:
    return sum(line.get("seconds") or 0.0 for line in run.lines) / 60


def _environment(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    gpu = environment.get("gpu")
    yield "GPU", ", ".join(gpu.values()) if gpu else "none"
    for name in ("system", "python"):
        yield name, str(environment.get(name, "not recorded"))
    for name, version in environment.get("packages", {}).items():
        yield name, version or "not installed"


def _measure(run: Run) -> str:
    return "Exact matches" if run.scores.get("kind") == "reference" else "Mean score"


def _score(run: Run, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0%}" if run.scores.get("kind") == "reference" else f"{value:.2f}"


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
